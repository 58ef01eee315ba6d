"""The model card of an export: README.md with what the run says of itself. No torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.files.events import read_events, steps
from thinwire.hub.files import CONFIG, GENERATION, TOKENIZER
from thinwire.units import show_count

CARD, _EVENTS = "README.md", "events.jsonl"


@dataclass(frozen=True)
class Card:
    """What an export knows of itself."""

    run: Path
    settings: Mapping[str, Any]
    """The run file."""
    step: int
    model_type: str
    parameters: int
    precision: str
    base: str | None
    """Where its first weights came from; None: they were drawn."""
    adapters: bool

    def write(self, folder: Path) -> None:
        """README.md, with the fields between `---` that model hubs read."""
        text = "\n".join([*self._head(), *self._words(folder), "", *self._table(), ""])
        (folder / CARD).write_text(text, encoding="utf-8")

    def _head(self) -> Iterator[str]:
        yield from ("---", f"library_name: {'peft' if self.adapters else 'transformers'}")
        yield from ("pipeline_tag: text-generation", "tags:", "- thinwire", *(["- lora"] if self.adapters else []))
        if self.base is not None:
            yield f"base_model: {json.dumps(self.base)}"
        yield "---"

    def _words(self, folder: Path) -> Iterator[str]:
        what = "Adapters for a" if self.adapters else "A"
        yield from ("", f"# {self.run.absolute().name}", "")
        yield (
            f"{what} {self.model_type} model of {show_count(self.parameters)} parameters, as it was after step "
            f"{self.step:,} of a run of thinwire, in {self.precision}."
        )
        if (folder / CONFIG).is_file():
            loaded = ["model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
            if (folder / TOKENIZER).is_file():
                loaded.append("tokenizer = AutoTokenizer.from_pretrained(FOLDER)")
            yield from (
                "",
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                *loaded,
                "```",
            )
        if (folder / GENERATION).is_file():
            ends = json.loads((folder / GENERATION).read_text(encoding="utf-8")).get("eos_token_id")
            if ends is not None:
                yield from (
                    "",
                    f"Generation ends at token id {' or '.join(map(str, ends if isinstance(ends, list) else [ends]))}.",
                )

    def _table(self) -> Iterator[str]:
        yield from ("| what | value |", "| --- | --- |")
        for name, value in self._figures():
            yield f"| {name} | {str(value).replace('|', '/')} |"

    def _figures(self) -> Iterator[tuple[str, Any]]:
        """Only what the run has said: a figure that is not there has no row."""
        yield "first weights", "drawn at random" if self.base is None else f"`{self.base}`"
        data, batch, run = (self.settings.get(section, {}) for section in ("data", "batch", "run"))
        yield "data", f"`{data.get('path')}`"
        yield "steps", f"{self.step:,} of {run.get('steps', self.step):,}"
        yield "batch", f"{batch.get('sequences')} sequences of {batch.get('tokens')} tokens"
        yield "peak learning rate", self.settings.get("optimizer", {}).get("lr")
        yield "seed", run.get("seed")
        yield from self._measured(self.run / _EVENTS)

    def _measured(self, log: Path) -> Iterator[tuple[str, Any]]:
        if not log.is_file():
            return
        done = {number: record for number, record in steps(log).items() if number <= self.step}
        if done:
            yield "tokens scored", f"{sum(record['tokens'] for record in done.values()):,}"
            scored = [record["loss"] for _, record in sorted(done.items()) if record["loss"] is not None]
            if scored:  # a step without a scored token has no loss
                yield "training loss of the last step", f"{float(scored[-1]):.4f}"
        evals = read_events(log, "eval")
        scored = [record for record in evals if record["step"] <= self.step and record["loss"] is not None]
        if scored:
            last = scored[-1]
            yield f"validation loss at step {last['step']:,}", f"{float(last['loss']):.4f}"
            yield "validation perplexity", f"{float(last['perplexity']):.2f}"
            if last.get("bits_per_byte") is not None:
                yield "validation bits per byte", f"{float(last['bits_per_byte']):.4f}"
            yield "validation tokens", f"{last['tokens']:,}"
        starts = list(read_events(log, "run_start"))
        if starts:
            yield "ranks", ", then ".join(dict.fromkeys(str(record["ranks"]) for record in starts))
