"""The README's Python runs: on tiny models in place of the ones from the Hub."""

import json
import re
from pathlib import Path

from conftest import CHAT_TEMPLATE, tiny_llama, word_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolLM2-{}-Instruct"


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    train, load = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    words = ["<user>", "<assistant>", *(f"w{i}" for i in range(92))]
    for size, model in (("135M", tiny_llama(3, 16)), ("360M", tiny_llama(4, 24))):
        model.save_pretrained(tmp_path / size)
        word_tokenizer(words, CHAT_TEMPLATE).save_pretrained(tmp_path / size)
        train, load = (text.replace(HUB.format(size), str(tmp_path / size)) for text in (train, load))
    rows = [{"prompt": f"w{i % 90} w{i // 90}", "completion": " w1 w2"} for i in range(140)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(train.replace("bf16=True", "bf16=True, use_cpu=True, report_to='none', disable_tqdm=True"), scope)
    exec("from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n" + load, scope)
    assert "eval_kl" in capsys.readouterr().out
    assert scope["model"].peft_config["default"].r == 16


def test_paths_of_the_readme_exist():
    root = Path(__file__).parents[1]
    paths = re.findall(r"\]\(((?:docs|recipes|benchmarks)/[^)]+)\)", README) + re.findall(r"`((?:recipes)/[\w./-]+)`", README)
    assert len(paths) > 5
    assert [path for path in paths if not (root / path).exists()] == []
