"""Proportions of many sources from few settings: multipliers by language and domain, probabilities or a temperature.

With s the size of a source, in rows per epoch, and m its weight times the multiplier of its domain, source i of
language l has the proportion

    p_i = s_i * m_i / sum_{j in l} (s_j * m_j) * P_l

P_l is the probability of the language if ``languages`` is set. Otherwise P_l ~ S_l ** (1 / temperature), where S_l, the
sum of s_j * m_j, is the size of the language: temperature 1 samples languages by size, a large one almost equally
(multilingual BERT; mT5, arXiv 2010.11934). A source without a language counts as a language by itself.

Example: English has 90 rows, German 10. The proportions are 0.9 and 0.1 at temperature 1. At temperature 2 they are
sqrt(90) : sqrt(10) = 3 : 1, so 0.75 and 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torchladder.data.source_config import SourceConfig
from torchladder.registry import require, unknown_name

DomainMultipliers = dict[str, float | dict[str, float]]
"""Language -> domain -> multiplier; or domain -> multiplier, for every language without a multiplier for the domain."""


@dataclass(frozen=True)
class MixtureWeights:
    """Computes the proportions of sources.

    Attributes:
        domains: multipliers of domains.
        languages: probability of each language, relative to the others.
        temperature: moves languages from proportions by size (1) towards equal ones.
    """

    domains: DomainMultipliers = field(default_factory=dict)
    languages: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None

    def validate(self, sources: Sequence[SourceConfig]) -> None:
        """Checks the settings against the sources.

        Raises:
            ConfigError: a language or domain has no source, a source lacks a language or domain or has one without
                a setting, or a number is out of range.
        """
        require(
            self.temperature is None or 0 < self.temperature < math.inf,
            f"data.temperature = {self.temperature}: must be a finite number above 0.",
        )
        require(
            self.temperature is None or not self.languages,
            "data: languages and temperature both set the proportions of languages: set one.",
        )
        _check_positive("languages", self.languages)
        _check_positive("domains", {key: value for key, value in self.domains.items() if not isinstance(value, dict)})
        if self.languages:
            self._check_languages(sources)
        if self.domains:
            self._check_domains(sources)

    def proportions(self, sources: Sequence[SourceConfig], rows_per_epoch: Sequence[Fraction]) -> list[Fraction]:
        """Returns the proportion of each source; they sum to 1.

        Args:
            sources: in order.
            rows_per_epoch: the size of each source; it counts only if domains, languages or temperature are set.
        """
        for source in sources:
            weight = source.weight
            require(0 <= weight < math.inf, f"the weight of the source {source.title} is {weight}: must be 0 or more.")
        by_size = bool(self.domains or self.languages) or self.temperature is not None
        amounts = [
            Fraction(str(source.weight)) * (size * Fraction(str(self._multiplier(source))) if by_size else 1)
            for source, size in zip(sources, rows_per_epoch, strict=True)
        ]
        require(any(amounts), "data.sources: all weights are 0: at least one must be above 0.")
        groups = [source.language or f"source {i}" for i, source in enumerate(sources)]
        totals = {group: sum(a for g, a in zip(groups, amounts, strict=True) if g == group) for group in groups}
        probabilities = {group: self._probability(group, total) for group, total in totals.items() if total}
        total_probability = sum(probabilities.values())
        return [
            amount / totals[group] * probabilities[group] / total_probability if amount else Fraction(0)
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
        everywhere = self.domains.get(source.domain, 1.0)
        return 1.0 if isinstance(everywhere, dict) else everywhere

    def _check_languages(self, sources: Sequence[SourceConfig]) -> None:
        present = {source.language for source in sources}
        for language in self.languages:
            if language not in present:
                raise unknown_name("language", language, present - {""}, "data.languages, which no source has")
        for source in sources:
            require(
                bool(source.language), f"the source {source.title} needs a language, because data.languages is set."
            )
            if source.language not in self.languages:
                raise unknown_name("language", source.language, self.languages, f"the source {source.title}")

    def _check_domains(self, sources: Sequence[SourceConfig]) -> None:
        pairs = {(source.language, source.domain) for source in sources}
        languages, domains = {language for language, _ in pairs}, {domain for _, domain in pairs}
        for key, value in self.domains.items():
            if not isinstance(value, dict):
                if key not in domains:
                    raise unknown_name("domain", key, domains - {""}, "data.domains, which no source has")
                continue
            if key not in languages:
                raise unknown_name("language", key, languages - {""}, "data.domains, which no source has")
            require(bool(value), f"data.domains.{key} is empty: set the multiplier of at least one domain.")
            _check_positive(f"domains.{key}", value)
            for domain in value:
                if (key, domain) not in pairs:
                    known = {of for language, of in pairs if language == key}
                    raise unknown_name("domain", domain, known - {""}, f"data.domains.{key}, which no source has")
        everywhere = {key for key, value in self.domains.items() if not isinstance(value, dict)}
        for source in sources:
            require(bool(source.domain), f"the source {source.title} needs a domain, because data.domains is set.")
            of_language = self.domains.get(source.language, {})
            known = {*(of_language if isinstance(of_language, dict) else ()), *everywhere}
            if source.domain not in known:
                raise unknown_name("domain", source.domain, known, f"the source {source.title}, without a multiplier")


def _check_positive(where: str, numbers: Mapping[str, float]) -> None:
    for key, value in numbers.items():
        require(
            0 < value < math.inf,
            f"data.{where}.{key} = {value}: must be a finite number above 0; data.exclude leaves sources out.",
        )
