"""Imports a mixture of ALLaM's recipe for continued pretraining: its JSON files, and what the names of shards say.

A shard is named ``{language}_{domain}_..._tc={tokens}.bin``. With m the multiplier of its domain, P_l the probability
of its language l, and t its tokens, a shard is read with the probability t * m / sum_{j in l} (t_j * m_j) * P_l, which
is what ``MixtureWeights`` computes from ``domains`` and ``languages``. The original is ``data_ratio_from_file.py`` in
forks of NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import tomli_w

from torchladder.data.file_patterns import match_files
from torchladder.data.formats.document_split import split_bounds
from torchladder.data.formats.indexed import IndexedTokens, prefix_of
from torchladder.data.mixing.mixture_weights import MixtureWeights
from torchladder.data.source_config import SourceConfig
from torchladder.registry import ConfigError, require

EXCLUDE_KEY = "exclude_iterator_name"


@dataclass(frozen=True)
class Shard:
    """A pair of token files with the language and domain of its name.

    Attributes:
        prefix: its path without ``.bin``.
        tokens: as its name says, or its index; None if neither is there.
    """

    prefix: str
    language: str
    domain: str
    tokens: int | None

    @property
    def name(self) -> str:
        return Path(self.prefix).name

    @staticmethod
    def parse(prefix: str) -> Shard:
        """Returns the shard of a path; raises ConfigError if its name has no language and domain."""
        name = Path(prefix).name
        language, _, rest = name.partition("_")
        domain = rest.partition("_")[0]
        require(
            bool(language and domain),
            f"{name!r} does not say its language and domain: rename it to {{language}}_{{domain}}_...",
        )
        count = re.search(r"(?:^|_)tc=(\d+)(?:_|$)", name)
        if count:
            return Shard(prefix, language, domain, int(count[1]))
        exists = Path(f"{prefix}.idx").is_file()
        return Shard(prefix, language, domain, IndexedTokens(prefix).num_tokens if exists else None)


@dataclass
class MixtureImport:
    """A mixture from the shards and the numbers of three JSON files.

    Attributes:
        shards: all of them, in order.
        ratios: domain -> multiplier, or language -> domain -> multiplier, or language -> multiplier of all its domains.
        probabilities: language -> probability; empty: languages are read by size.
        excluded: names of shards to leave out, with or without a suffix or folder.
        split: of each source, as Megatron's; empty: all of it is for training.
        notices: a sentence on each entry that has not been imported.

    Raises:
        ConfigError: a number is invalid, a language has shards and no probability, or nothing is left to read.
    """

    shards: Sequence[Shard]
    ratios: Mapping[str, Any] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    excluded: Sequence[str] = ()
    split: str = ""
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        split_bounds(self.split, "train")  # raises
        _check_numbers("the data ratios", self.ratios)
        _check_numbers("the language probabilities", self.probabilities, nested=False)
        names = Counter(shard.name for shard in self.shards)
        self._labels = {one: one.name if names[one.name] == 1 else one.prefix for one in self.shards}
        excluded = {Path(prefix_of(name)).name for name in self.excluded}
        self.notices += [f"{name}: excluded, but no shard has this name" for name in sorted(excluded - names.keys())]
        self._exclude = [one for one in self.shards if one.name in excluded]
        self._multipliers: dict[tuple[str, str], float] = {}
        self._read = []
        for shard in self.shards:
            if shard.name not in excluded and (reason := self._reason_to_leave_out(shard)):
                self.notices.append(f"{shard.name}: left out, {reason}")
            elif shard.name not in excluded:
                self._read.append(shard)
        require(bool(self._read), "no shard is left to read: each is excluded, or has no multiplier or probability.")
        self._name_unused()
        for shard in self._read:
            known = not self.probabilities or shard.language in self.probabilities
            require(known, f"{shard.name}: its language {shard.language!r} has no probability; add it, or exclude it.")

    def settings(self) -> dict[str, Any]:
        """Returns the settings ``[data]``."""
        kept, pairs = {*self._read, *self._exclude}, {(one.language, one.domain) for one in self._read}
        listed = [one for one in self.shards if one in kept]
        data: dict[str, Any] = {"sources": [self._source(one) for one in listed]}
        domains: dict[str, dict[str, float]] = {}
        for (language, domain), multiplier in self._multipliers.items():
            if (language, domain) in pairs:
                domains.setdefault(language, {})[domain] = multiplier
        languages = {name: self.probabilities[name] for name in self.probabilities if name in self._languages}
        optional = {"domains": domains, "languages": languages, "exclude": [self._labels[one] for one in self._exclude]}
        if not domains and not languages:
            data["temperature"] = 1.0  # by size
        return {"data": data | {key: value for key, value in optional.items() if value}}

    def to_toml(self, title: str) -> str:
        """Returns the settings as TOML, headed by where they come from and what they lack."""
        lines = [f"Imported from {title}.", *(f"{notice}." for notice in self.notices)]
        return "".join(f"# {line}\n" for line in lines) + "\n" + tomli_w.dumps(self.settings())

    def table(self, total_tokens: int | None = None) -> list[str]:
        """Returns a line for each language and each shard: its probability, its tokens, and what a run reads of them.

        Args:
            total_tokens: that the run reads.
        """
        if unknown := [one.name for one in self._read if one.tokens is None]:
            return [f"shares are known when the run starts: {len(unknown)} names without tc=, such as {unknown[0]}"]
        found = self.settings()["data"]
        weights = MixtureWeights(found.get("domains", {}), found.get("languages", {}), found.get("temperature"))
        sources = [SourceConfig(**self._source(one)) for one in self._read]
        require(any(one.tokens for one in self._read), "no shard has a token.")
        shares = weights.proportions(sources, [Fraction(one.tokens or 0) for one in self._read])
        lines = []
        for language in self._languages:
            chosen = [(p, one) for p, one in zip(shares, self._read, strict=True) if one.language == language]
            share, tokens = sum(p for p, _ in chosen), sum(one.tokens or 0 for _, one in chosen)
            lines.append(_row(share, language, tokens, total_tokens))
            lines += [_row(p, f"  {one.name}", one.tokens or 0, total_tokens) for p, one in chosen]
        return lines

    @property
    def _languages(self) -> list[str]:
        return list(dict.fromkeys(one.language for one in self._read))

    def _source(self, shard: Shard) -> dict[str, str]:
        path = f"{shard.prefix}.bin"
        source = {"path": path, "label": self._labels[shard], "language": shard.language, "domain": shard.domain}
        return source | ({"split": self.split} if self.split else {})

    def _reason_to_leave_out(self, shard: Shard) -> str:
        """Returns why a shard is not read, or nothing; notes the multiplier of one that is."""
        if self.probabilities.get(shard.language) == 0:
            return f"the probability of {shard.language} is 0"
        if not self.ratios:
            return ""
        of_language = self.ratios.get(shard.language)
        everywhere = self.ratios.get(shard.domain)
        if isinstance(of_language, Mapping) and shard.domain in of_language:
            multiplier = of_language[shard.domain]
        elif everywhere is not None and not isinstance(everywhere, Mapping):
            multiplier = everywhere
        elif of_language is not None and not isinstance(of_language, Mapping):
            multiplier = of_language
        else:
            return f"its domain {shard.domain} has no multiplier"
        if multiplier == 0:
            return f"the multiplier of its domain {shard.domain} is 0"
        self._multipliers[shard.language, shard.domain] = multiplier
        return ""

    def _name_unused(self) -> None:
        """Adds a notice for each number that no shard uses."""
        languages, domains = ({getattr(one, key) for one in self._read} for key in ("language", "domain"))
        pairs = {(one.language, one.domain) for one in self._read}
        for language, probability in self.probabilities.items():
            if language not in languages and probability:
                others = "the others share its probability"
                self.notices.append(f"the probability of {language} = {probability}: no shard of it is read, {others}")
        for key, value in self.ratios.items():
            if isinstance(value, Mapping):
                unused = [f"{key}.{domain} = {m}" for domain, m in value.items() if (key, domain) not in pairs and m]
            else:
                unused = [f"{key} = {value}"] if key not in languages | domains and value else []
            self.notices += [f"the multiplier {one}: no shard of it is read" for one in unused]


def find_shards(patterns: Sequence[str]) -> list[Shard]:
    """Returns the shards whose ``.bin`` files are named by paths, folders and globs."""
    files = match_files(patterns, lambda file: file.suffix == ".bin", ".bin file of tokens")
    return [Shard.parse(prefix_of(file)) for file in files]


def read_signature(path: Path, folder: str) -> tuple[list[Shard], list[str]]:
    """Returns the shards that a list of file names names, each once, and a notice on each that is no shard.

    Args:
        path: of the JSON file.
        folder: of the shards; empty for names that are paths.
    """
    names = read_json(path)
    listed = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    require(listed, f"{path} must be a JSON list of the names of .bin files.")
    named = [name for name in names if Path(name).suffix in ("", ".bin", ".idx") or "_tc=" in name]
    prefixes = dict.fromkeys(prefix_of(name) for name in named)
    require(bool(prefixes), f"{path} names no .bin file.")
    notices = [f"{name}: not a .bin file of tokens" for name in names if name not in named]
    shards = [Shard.parse(str(Path(folder, prefix))) for prefix in prefixes]
    if folder and Path(folder).is_dir():
        notices += [f"{one.name}: not in {folder}" for one in shards if not Path(f"{one.prefix}.bin").is_file()]
    return shards, notices


def read_excluded(path: Path) -> list[str]:
    """Returns the names of a JSON file ``{"exclude_iterator_name": [...]}``, or of a JSON list."""
    found = read_json(path)
    names = found[EXCLUDE_KEY] if isinstance(found, dict) and found.keys() == {EXCLUDE_KEY} else found
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(listed, f'{path} must be {{"{EXCLUDE_KEY}": ["name.bin", ...]}}.')
    return [*names]


def read_table(path: Path) -> dict[str, Any]:
    """Returns a JSON object."""
    found = read_json(path)
    require(isinstance(found, dict) and bool(found), f"{path} must be a JSON object, and not empty.")
    return dict(found)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises ConfigError if it has none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error


def _check_numbers(what: str, numbers: Mapping[str, Any], nested: bool = True) -> None:
    for key, value in numbers.items():
        if nested and isinstance(value, Mapping):
            _check_numbers(f"{what} of {key}", value, nested=False)
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        require(number, f"{what}: {key} = {value!r} must be a number, 0 or more.")


def _row(share: Fraction | int, name: str, tokens: int, total: int | None) -> str:
    line = f"{float(share):9.6f}  {name}: {tokens:,} tokens"
    if total is None:
        return line
    read = f", {int(share * total):,} of {total:,} read"
    return line + read + (f", {float(share * total / tokens):.2f} epochs" if tokens else "")
