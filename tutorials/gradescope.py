"""Turn the report of grade.py into what Gradescope shows: python -m tutorials.gradescope REPORT RESULTS"""

import json
import sys

report, results = sys.argv[1:]
with open(report, encoding="utf-8") as file:
    tutorials = json.load(file)["tutorials"]
tests = [{"name": f"{tutorial}: {exercise}", "score": row["points"], "max_score": 1,
          "output": row["differs"] or f"all {row['cases']} cases are right"}
         for tutorial, rows in tutorials.items() for exercise, row in rows.items()]
with open(results, "w", encoding="utf-8") as file:
    json.dump({"tests": tests}, file)
