"""Tasks of lm-eval that need no network."""

from __future__ import annotations

import json
from pathlib import Path

_SUMS = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_LINES = """
task: lines
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
_EXAMPLES = """
task: examples
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list:
  - metric: exact_match
  - metric: bleu
"""


def sums(folder: Path) -> Path:
    """Writes three tasks: ``sums`` asks 20 times for a choice, ``lines`` has 7 texts, ``examples`` shows two before."""
    folder.mkdir()
    rows = [
        {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {(a + 2 * b + 1) % 9}"], "answer": 0}
        for a in range(4)
        for b in range(5)
    ]
    _write(folder, "sums", _SUMS, rows)
    _write(folder, "lines", _LINES, [{"text": f"the quick brown fox jumps {'again ' * n}"} for n in range(7)])
    _write(folder, "examples", _EXAMPLES, rows)
    return folder


def _write(folder: Path, name: str, task: str, rows: list[dict[str, object]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(task.format(data=folder / f"{name}.jsonl"))
