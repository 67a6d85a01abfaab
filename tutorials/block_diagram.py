"""Draw one block for tutorial 02. `python tutorials/block_diagram.py --record` renews block_diagram.png."""

import lesson
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(10, 3))
axis.set_xlim(0, 10)
axis.set_ylim(0.9, 4.2)
axis.axis("off")


def box(x, y, text, color):
    axis.text(x, y, text, ha="center", va="center", fontsize=10,
              bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": color, "linewidth": 1.5})


def arrow(start, end, color="black"):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.5})


def half(x, name, text, color):
    """One half of a block: it reads the stream at x and adds to it at x + 3.1."""
    axis.plot([x, x, x + 3.1], [3.5, 2.2, 2.2], color=color, linewidth=1.5, zorder=1)     # behind the boxes
    box(x, 2.2, "norm", color)
    box(x + 1.6, 2.2, name, color)
    arrow((x + 3.1, 2.18), (x + 3.1, 3.32), color)
    axis.text(x + 3.1, 3.5, "+", ha="center", va="center", fontsize=14, zorder=3,
              bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black"})
    axis.text(x + 1.6, 1.75, text, ha="center", va="top", fontsize=9, color=color)


arrow((0.3, 3.5), (9.7, 3.5))
half(1.6, "attention",
     "each position looks at itself and\nat earlier ones: queries, keys, values", lesson.BLUE)
half(5.5, "MLP", "each position works alone:\ngate, silu, a product", lesson.ORANGE)
axis.text(0.3, 3.65, "resid[l]", fontsize=10)
axis.text(9.7, 3.65, "resid[l + 1]", fontsize=10, ha="right")
axis.text(5, 3.85, "the residual stream: at each position, d_model numbers", ha="center", fontsize=10)
axis.set_title("Block l: two halves read the stream, and each adds to it", fontsize="medium")
lesson.save(figure, "block_diagram")
