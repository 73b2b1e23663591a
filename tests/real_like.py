"""Data laid out like the real sets, and a model folder for it, small enough for a test."""

import json
import random
from pathlib import Path

import tiny_models

THINGS = ("tea", "milk", "soup", "snow")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# What the library itself writes around questions and corrections.
FRAME = "Options: Answer: The answer is: Correct solution: Prediction: Corrected: user assistant"


def write_data(folder: Path, train: int = 260, test: int = 60) -> None:
    """`ecqa` with answers that only chance finds, `hh_helpful` whose longer reply is chosen."""
    rng = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        _write(folder / "ecqa" / f"{split}.jsonl", [_question(rng, split, i) for i in range(count)])
        _write(folder / "hh_helpful" / f"{split}.jsonl", [_pair(rng, i) for i in range(count)])


def _question(rng, split: str, number: int) -> dict:
    options = rng.sample(THINGS, 3)
    lines = [f"({letter}) {option}" for letter, option in zip("ABC", options, strict=True)]
    return {
        "id": f"{split}{number}",
        "question": "\n".join([f"Which is it {split}{number} ?", *lines]),
        "solution": f"it is {rng.choice(THINGS)} .",
        "answer": rng.choice("ABC"),
        "choices": options,
    }


def _pair(rng, number: int) -> dict:
    thing = rng.choice(THINGS)
    return {
        "prompt": f"\n\nHuman: tell {number} of {thing}\n\nAssistant:",
        "chosen": f"surely {thing} is good to have",
        "rejected": f"no {rng.choice(THINGS)}",
    }


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: Path, data: Path) -> None:
    """Write a model of a few thousand weights with a tokenizer of the words of the data."""
    words = dict.fromkeys(["<pad>", "<eos>", "<unk>", *FRAME.split()])
    for path in sorted(data.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for value in json.loads(line).values():
                texts = value if isinstance(value, list) else [value]
                words |= dict.fromkeys(" ".join(texts).split())
    words |= dict.fromkeys(f"{thing}," for thing in THINGS)
    # Numbers tell questions apart for people; the model reads them as unknown and learns sooner.
    words = [word for word in words if not any(letter.isdigit() for letter in word)]
    tokenizer = tiny_models.words(words, TEMPLATE)
    tiny_models.micro(tokenizer, width=32, feed_forward=48, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
