"""Shares of many sources from few numbers: multipliers by language and domain, probabilities or a temperature.

With s the size of a source, which is the rows that one epoch of it takes, and m its weight times the multiplier of its
domain, source i of language l has the share

    p_i = s_i · m_i / Σ_{j in l} (s_j · m_j) · P_l

P_l is the probability of the language where ``languages`` gives one, and else grows with the size of the language S_l,
which is Σ s_j · m_j, as S_l ^ (1 / temperature): at 1 every language has its share of the data, far above all have the
same (multilingual BERT; mT5, arXiv 2010.11934). Sources that name no language are each one of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torchladder.data.corpus import SourceConfig
from torchladder.registry import ConfigError, unknown_name

DomainMultipliers = dict[str, float | dict[str, float]]
"""Language -> domain -> multiplier; a domain with a number of its own has it in every language that does not say."""


@dataclass(frozen=True)
class MixtureWeights:
    """What decides the shares of sources beside their weights.

    Attributes:
        domains: multipliers of domains.
        languages: probability of each language, in any unit.
        temperature: how far languages move from their own sizes towards equal shares.
    """

    domains: DomainMultipliers = field(default_factory=dict)
    languages: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None

    @property
    def by_size(self) -> bool:
        """Whether shares depend on the sizes of sources; otherwise they are the weights."""
        return bool(self.domains or self.languages) or self.temperature is not None

    def check(self, sources: Sequence[SourceConfig]) -> None:
        """Compares what is said of languages and domains with the sources that there are.

        Raises:
            ConfigError: a language or domain has no source, a source has none or one that nothing is said of, or a
                number cannot be.
        """
        _require(
            self.temperature is None or 0 < self.temperature < math.inf,
            f"temperature = {self.temperature}: must be a finite number above 0.",
        )
        _require(
            self.temperature is None or not self.languages,
            "languages and temperature both say what share a language has: set one.",
        )
        _check_numbers("languages", self.languages)
        _check_numbers("domains", {key: value for key, value in self.domains.items() if not isinstance(value, dict)})
        if self.languages:
            self._check_languages(sources)
        if self.domains:
            self._check_domains(sources)

    def of(self, sources: Sequence[SourceConfig], sizes: Sequence[Fraction]) -> list[Fraction]:
        """Returns the share of each source, all of them 1 together.

        Args:
            sources: in order.
            sizes: rows that one epoch of each takes.
        """
        for source in sources:
            _require(
                0 <= source.weight < math.inf, f"the weight of {source.title} is {source.weight}: must be 0 or more."
            )
        amounts = [
            Fraction(str(source.weight)) * (size * Fraction(str(self._multiplier(source))) if self.by_size else 1)
            for source, size in zip(sources, sizes, strict=True)
        ]
        _require(any(amounts), "all weights are 0: one source at least has one above 0.")
        # Without languages to tell apart every source stands for itself.
        groups = [source.language or f"source {i}" for i, source in enumerate(sources)]
        totals = {group: sum(a for g, a in zip(groups, amounts, strict=True) if g == group) for group in groups}
        wanted = {group: self._probability(group, total) for group, total in totals.items() if total}
        whole = sum(wanted.values())
        return [
            amount / totals[group] * wanted[group] / whole if amount else Fraction(0)
            for group, amount in zip(groups, amounts, strict=True)
        ]

    def _probability(self, language: str, total: Fraction) -> Fraction:
        if self.languages:
            return Fraction(str(self.languages[language]))
        if self.temperature in (None, 1):
            return total
        return Fraction(str(float(total) ** (1 / self.temperature)))

    def _multiplier(self, source: SourceConfig) -> float:
        of_language = self.domains.get(source.language, {})
        if isinstance(of_language, dict) and source.domain in of_language:
            return of_language[source.domain]
        anywhere = self.domains.get(source.domain, 1.0)
        return 1.0 if isinstance(anywhere, dict) else anywhere

    def _check_languages(self, sources: Sequence[SourceConfig]) -> None:
        present = {source.language for source in sources}
        for language in self.languages:
            if language not in present:
                raise unknown_name("language in data.languages, of no source:", language, present - {""})
        for source in sources:
            _require(bool(source.language), f"the source {source.title} needs a language, since languages are set.")
            if source.language not in self.languages:
                raise unknown_name(f"language of the source {source.title}", source.language, self.languages)

    def _check_domains(self, sources: Sequence[SourceConfig]) -> None:
        pairs = {(source.language, source.domain) for source in sources}
        languages, domains = {language for language, _ in pairs}, {domain for _, domain in pairs}
        for key, value in self.domains.items():
            if not isinstance(value, dict):
                if key not in domains:
                    raise unknown_name("domain in data.domains, of no source:", key, domains - {""})
                continue
            if key not in languages:
                raise unknown_name("language in data.domains, of no source:", key, languages - {""})
            _require(bool(value), f"domains.{key} is empty.")
            _check_numbers(f"domains.{key}", value)
            for domain in value:
                if (key, domain) not in pairs:
                    known = {of for language, of in pairs if language == key}
                    raise unknown_name(f"domain in data.domains.{key}, of no source:", domain, known - {""})
        for source in sources:
            _require(bool(source.domain), f"the source {source.title} needs a domain, since domains are set.")
            of_language = self.domains.get(source.language, {})
            known = {*(of_language if isinstance(of_language, dict) else ()), *self._anywhere()}
            if source.domain not in known:
                raise unknown_name(f"domain of the source {source.title}, without a multiplier:", source.domain, known)

    def _anywhere(self) -> set[str]:
        return {key for key, value in self.domains.items() if not isinstance(value, dict)}


def _check_numbers(where: str, numbers: Mapping[str, float]) -> None:
    for key, value in numbers.items():
        _require(0 < value < math.inf, f"{where}.{key} = {value}: must be a finite number above 0; exclude leaves out.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"data: {message}")
