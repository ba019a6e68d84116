"""The short form of ``make soak``: every answer is right; how quick they were is printed, not judged."""

from __future__ import annotations

from pathlib import Path

from support.soak import machine, soak


def test_health_is_answered_rightly_while_gpus_come_and_go_and_servers_crash(tmp_path: Path) -> None:
    with machine(tmp_path) as (proxy, nvml):
        figures = soak(proxy, nvml, checks=1200, per_second=150)
        assert proxy.terminate() == 0
    print(figures)
    assert figures.wrong == []
    assert len(figures.took) == 1200
    assert figures.happened["health degraded"] > 0
    assert figures.happened["chat 200"] > 0
    assert "Traceback" not in proxy.log
