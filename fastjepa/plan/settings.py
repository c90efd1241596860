"""What of a configuration's `runtime` changes the cost of a step of ours."""

from __future__ import annotations

from typing import NamedTuple

from fastjepa.config import Config


class Settings(NamedTuple):
    """As the keys of `runtime` with these names.

    >>> Settings.of_row("fastjepa ragged, checkpointing")
    Settings(narrow_stream=False, activation_checkpointing=True, accumulate=1)
    """

    narrow_stream: bool = False
    activation_checkpointing: bool | str = False
    accumulate: int = 1

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Those of a configuration."""
        return cls(*(getattr(config.runtime, name) for name in cls._fields))

    @property
    def words(self) -> list[str]:
        """Those that are not as in a configuration that says nothing of them."""
        of = "" if self.activation_checkpointing is True else f"{self.activation_checkpointing} "
        words = {
            "narrow stream": self.narrow_stream,
            f"{of}checkpointing": self.activation_checkpointing,
            f"{self.accumulate} parts": self.accumulate > 1,
        }
        return [word for word, is_on in words.items() if is_on]

    def recomputes(self, part: str) -> bool:
        """Whether layers of a part that is trained ("context", "predictor") are taken forward again in backward."""
        return self.activation_checkpointing is True or self.activation_checkpointing == part

    @classmethod
    def of_row(cls, name: str) -> Settings:
        """Those of a row of the `step` and `count` suites, which says them behind a comma."""
        setting = name.partition(", ")[2]
        return PLAIN if setting in ("", "graphs") else NAMED[setting]


PLAIN = Settings()
NAMED = {
    "narrow stream": Settings(narrow_stream=True),
    "checkpointing": Settings(activation_checkpointing=True),
    "predictor checkpointing": Settings(activation_checkpointing="predictor"),
    "4 parts": Settings(accumulate=4),
}
