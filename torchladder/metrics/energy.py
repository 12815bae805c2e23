"""Energy and CO2 of a run, as codecarbon estimates them without a network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torchladder.registry import ConfigError, unknown_name

ENERGY_KEYS = ("energy_kwh", "co2_kg")


def check_energy_country(country: str) -> None:
    """Raises ``ConfigError`` unless codecarbon is installed and knows the electricity of the country (ISO 3166)."""
    try:
        from codecarbon.input import DataSource
    except ImportError:
        raise ConfigError(
            "metrics.energy_country needs the package codecarbon: pip install codecarbon, of the extra "
            "torchladder[energy]."
        ) from None
    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise unknown_name("country", country, known, "metrics.energy_country")


class EnergyMeter:
    """Measures this machine from now on; ``totals`` are those of all machines of the run.

    A thread measures every 15 seconds: GPUs by NVML, CPUs by RAPL or, where it may not be read, by their nominal power,
    memory by its size. codecarbon's own settings (region, PUE, ...) are read from its file and its variables.

    Args:
        country: whose electricity the run uses, as three letters of ISO 3166.
        machines: of the run; they are taken to need as much as this one.

    Raises:
        ConfigError: as ``check_energy_country``.
    """

    def __init__(self, country: str, machines: int) -> None:
        check_energy_country(country)
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput

        measured = self._measured = dict.fromkeys(ENERGY_KEYS, 0.0)

        class Totals(BaseOutput):
            def out(self, total: Any, delta: Any) -> None:
                measured.update(energy_kwh=total.energy_consumed * machines, co2_kg=total.emissions * machines)

            live_out = out

        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            output_methods=[],  # and no file
            output_handlers=[Totals()],
            api_call_interval=1,  # each measurement reaches the handler
            allow_multiple_runs=True,
            log_level="error",
        )
        self._tracker.start()
        self.restart({})

    def restart(self, totals: Mapping[str, float]) -> None:
        """Continues from the totals of an earlier process, or of an earlier step of this one."""
        self._tracker.flush()
        self._before = {key: totals.get(key, 0.0) - self._measured[key] for key in ENERGY_KEYS}

    def totals(self, measure_now: bool = False) -> dict[str, float]:
        """Returns kWh and kg of CO2 equivalents since the start of the run, as of the last measurement or now."""
        if measure_now:  # takes up to half a second
            self._tracker.flush()
        return {key: self._before[key] + self._measured[key] for key in ENERGY_KEYS}

    def close(self) -> None:
        """Ends the measurements; may be called twice."""
        self._tracker.stop()
