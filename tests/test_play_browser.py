"""ministeer play in a real browser: what a person sees and does. Needs Playwright's client and Chromium."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, UNTRACED

from ministeer import generate, load
from ministeer.evaluation.steerability import strength
from ministeer.play import engine
from ministeer.steering import random_like

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    CHROMIUM, missing = None, "Playwright's client is not installed: pip install playwright"
else:
    missing = "there is no Chromium: apt-get install chromium"
# In CI the tests run, and fail where there is no browser.
pytestmark = pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason=missing)

SETTING = {"prompt": "I hate you because", "plus": " love", "minus": " hate", "layer": "2", "coeff": "3",
           "where": "middle", "n": "6", "max_new_tokens": "8", "temperature": "1", "top_p": "0.8",
           "freq_penalty": "0.5", "seed": "4", "words": "love kind", "target": " you"}
HASH = "#" + "&".join(f"{name}={value.replace(' ', '+')}" for name, value in SETTING.items())


@pytest.fixture(scope="module")
def address(tiny_llama):
    """The address of the page for a tiny model, served by the command itself."""
    command = [sys.executable, "-m", "ministeer", "play", "--no-browser", "--port=0", f"--model={tiny_llama}"]
    process = subprocess.Popen(command, cwd=ROOT, env=UNTRACED, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    yield re.search(r"http://\S+", process.stdout.readline())[0]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.fixture(scope="module")
def browser(address):
    assert CHROMIUM, missing
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A new page; afterwards, no request went elsewhere, and the console held no error."""
    page, requests, faults = browser.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    page.close()
    assert requests and all(url.startswith((address, "data:", "blob:")) for url in requests), requests
    # Chromium itself notes each answer of 422, which is how the server refuses a field.
    assert [text for text in faults if "422" not in text] == []


def outlined(page):
    cells = page.locator("#map .outlined").all()
    return {tuple(int(cell.get_attribute(f"data-{way}")) for way in ("row", "column")) for cell in cells}


def ready(page):
    """Wait for the answer with all five random vectors."""
    expect(page.locator("#next tbody tr").first.locator(".dot")).to_have_count(5)


def test_a_preset_steers(page, address):
    page.goto(address)
    page.get_by_role("button", name="love - hate").click()
    expect(page.get_by_label("Prompt")).to_have_value(engine.PRESETS["love - hate"]["prompt"])
    expect(page.locator("#map .outlined").first).to_have_attribute("data-row", "2")
    expect(page.locator("#map .outlined").first).to_have_attribute("data-column", "2")
    ready(page)
    assert page.locator("#tokens .token.steered").count() == len(outlined(page)) > 0
    changes = page.locator("#next td.number:nth-child(3)").all_inner_texts()
    assert any(float(text) for text in changes)


def test_a_link_restores_the_state_and_the_outline_is_where_the_model_is_changed(page, address, tiny_llama):
    page.goto(address + HASH)
    ready(page)
    for name, value in SETTING.items():
        assert page.locator(f"[name={name}]").input_value() == value
    assert page.locator("#layer-slide").input_value() == "2"
    model, tokenizer = load(tiny_llama)
    setting = engine.Setting(*(SETTING[name] for name in ("prompt", "plus", "minus")), 2, 3.0, "middle")
    steer = engine.addition(model, tokenizer, setting)
    ids = torch.tensor([tokenizer.encode(setting.prompt)])
    changed = [(a - b)[0].norm(dim=-1) > 0 for a, b in zip(model(ids, steer)[1], model(ids)[1], strict=True)]
    size = strength(model, tokenizer, steer, [setting.prompt])
    assert f" has {size:.2f}\u00a0× the layer’s mean norm" in page.locator("#strength").inner_text()
    assert outlined(page) == {(2, t) for t in changed[2].nonzero().flatten().tolist()}
    unchanged = page.locator("#map .cell.unchanged")
    assert unchanged.count() == sum(int((~row).sum()) for row in changed)       # the cone is the model's


def test_three_columns_stream_and_equal_generate(page, address, tiny_llama):
    page.goto(address + HASH)
    page.get_by_role("button", name="Draw completions").click()
    expect(page.locator("#progress")).to_have_text("all 18 are complete")
    model, tokenizer = load(tiny_llama)
    setting = engine.Setting(*(SETTING[name] for name in ("prompt", "plus", "minus")), 2, 3.0, "middle")
    steer = engine.addition(model, tokenizer, setting)
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.8, "freq_penalty": 0.5, "seed": 4}

    def wanted(s, n):
        return generate(model, tokenizer, setting.prompt, n, steer=s, **options)
    plain, steered, random = (
        [item.text_content() for item in column.locator("li > span").all()]
        for column in page.locator("#columns ol").all())
    assert plain == wanted((), 6) and steered == wanted(steer, 6)
    assert random[0::5] == wanted(random_like(steer, 0), 2)
    assert random[4::5] == wanted(random_like(steer, 4), 1)
    # The counter has an interval, and follows the words.
    expect(page.locator("#counts tbody tr")).to_have_count(3)
    page.locator("#words").fill(next(filter(None, re.split(r"\W+", " ".join(steered)))))
    hits = page.locator("#columns ol").nth(1).locator(".hit")
    expect(page.locator("#counts tbody tr").nth(1)).to_contain_text(re.compile(r"[1-6] of 6"))
    assert hits.count() > 0


def test_text_of_a_model_is_never_html(page, address):
    page.goto(address + "#prompt=<img src=x onerror=alert(1)>&layer=0")
    ready(page)
    assert page.locator("img").count() == 0
    assert "<" in page.locator("#tokens").inner_text()


def test_a_click_in_the_map_of_layers_moves_the_sliders(page, address):
    page.goto(address + HASH)
    page.get_by_role("button", name="Try all layers").click()
    expect(page.locator("#scan-says")).to_have_text("4 of 4 layers")
    page.locator('#layers [data-row="3"][data-column="4"]').click()         # -4, -2, -1, 1, 2, 3, 4
    expect(page.locator("#layer-slide")).to_have_value("3")
    expect(page.locator("#coeff")).to_have_value("2")
    expect(page.locator("#map .outlined").first).to_have_attribute("data-row", "3")
    expect(page.locator("#layers .outlined")).to_have_attribute("data-row", "3")
    assert "layer=3" in page.url and "coeff=2" in page.url


def test_the_map_of_layers_marks_what_lies_beyond_five_random_vectors(page, address, tiny_llama):
    page.goto(address + HASH)
    page.get_by_role("button", name="Try all layers").click()
    expect(page.locator("#scan-says")).to_have_text("4 of 4 layers")
    model, tokenizer = load(tiny_llama)
    setting = engine.Setting(*(SETTING[name] for name in ("prompt", "plus", "minus")), 2, 3.0, "middle")
    first, *layers = engine.scan(model, tokenizer, setting, SETTING["target"])
    column = first["coeffs"].index(3)
    for row, layer in enumerate(layers):
        title = page.locator(f'#layers [data-row="{row}"][data-column="{column}"] title').text_content()
        for x in (layer["steered"][column], min(layer["random"]), max(layer["random"])):
            assert f"{x:+.2f} " in title
    marked = sum(not min(x["random"]) <= x["steered"][column] <= max(x["random"]) for x in layers)
    expect(page.locator("#layers text", has_text="●")).to_have_count(marked)
    expect(page.locator("#scan-place")).to_contain_text(f"{marked} of 4 layers")


def test_a_slider_changes_the_map(page, address):
    page.goto(address + HASH)
    ready(page)
    page.locator("#layer-slide").fill("1")
    expect(page.locator("#map .outlined").first).to_have_attribute("data-row", "1")
    page.locator("#tokens [data-position='2']").click()
    expect(page.locator("#where")).to_have_value("2")
    expect(page.locator("#map .outlined").first).to_have_attribute("data-column", "2")


@pytest.mark.parametrize("name, value, sentence", [
    ("prompt", "", "does not fit"), ("layer", "4", "this model has blocks 0 … 3"),
    ("top_p", "7", "from 0 to 1")])
def test_bad_input_is_answered_beside_its_field(page, address, name, value, sentence):
    page.goto(address + HASH.replace("middle", "front") + f"&{name}={value}")
    field = page.locator(".field", has=page.locator(f"[name={name}]"))
    expect(field.get_by_role("alert")).to_contain_text(sentence)
    field.locator(f"[name={name}]").fill(SETTING[name])
    expect(page.get_by_role("alert")).to_have_count(0)


def test_arrow_keys_read_the_map_and_the_views_switch(page, address):
    page.goto(address + HASH)
    ready(page)
    page.locator("#map").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#place")).to_contain_text("resid[2], position 1")
    expect(page.locator("#lens tbody tr")).to_have_count(5)
    page.get_by_label("unsteered norms").check()
    expect(page.locator("#map .outlined")).to_have_count(0)
    page.get_by_label("logit lens").check()
    texts = page.locator("#map text")
    tokens = page.locator("#tokens [data-position]").count()
    expect(texts).to_have_count(1 + tokens + 5 * tokens)       # layer 0, the columns, the cells


def test_the_vector_and_the_map_are_saved(page, address, tmp_path):
    page.goto(address + HASH)
    ready(page)
    for button, name in (("Save the vector", "vector.safetensors"), ("Save the map", "map.svg")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        download.value.save_as(tmp_path / name)
    from ministeer import Steer
    assert Steer.load(tmp_path / "vector.safetensors").layer == 2
    picture = (tmp_path / "map.svg").read_text(encoding="utf-8")
    assert picture.count("<rect") == page.locator("#map rect").count() > 0


def test_a_click_before_the_fields_are_filled_does_nothing(page, address):
    held, asked = [], []

    def hold(route):
        held.append(route)
    page.route("**/about", hold)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address + HASH)
    page.locator("#draw").scroll_into_view_if_needed()
    box = page.locator("#draw").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    held[0].continue_()
    ready(page)
    assert f"{address}complete" not in asked
    page.get_by_role("button", name="Draw completions").click()
    expect(page.locator("#counts tbody tr")).to_have_count(3)


def test_a_narrow_page_does_not_scroll_sideways(page, address):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(address + HASH)
    page.get_by_role("button", name="Draw completions").click()
    expect(page.locator("#counts tbody tr")).to_have_count(3)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
