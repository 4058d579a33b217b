"""The table of a results file."""

from benchmarks.table import compiled_table, rivals_table, table

MACHINE = {
    "processor": "CPU",
    "cores": 2,
    "cpu_capability": "AVX2",
    "threads": 1,
    "torch": "2.15",
    "date": "2026-11-21",
}


def row(suite: str, group: str, path: str, seconds: float, **more: int) -> dict:
    return {"suite": suite, "group": group, "path": path, "baseline": "plain", "median_seconds": seconds, **more}


def test_table_of_a_suite() -> None:
    rows = [
        row("integrations", "Swin", "plain", 2.0, peak_bytes=3 << 20),
        row("integrations", "Swin", "cpu", 0.5, peak_bytes=1 << 20),
        row("integrations", "DETR", "cpu", 1.0),
        row("magnet", "MagNet", "plain", 1.0),
    ]
    lines = table({"machine": MACHINE, "rows": rows}, "integrations").splitlines()
    assert lines[0] == "CPU, 2 cores (AVX2), 1 threads, torch 2.15, 2026-11-21"
    assert lines[-1] == "| Swin | 2.00 s | 500 ms | **4.00×** | 3 MiB | 1 MiB |"
    assert "packed" not in lines[2]
    assert not any("DETR" in line or "MagNet" in line for line in lines)  # nothing to compare with; another suite


def test_table_with_packed_weights() -> None:
    rows = [row("integrations", name, path, 2.0, peak_bytes=3 << 20) for name in "AB" for path in ("plain", "cpu")]
    rows.insert(2, row("integrations", "A", "cpu, packed weights", 0.5, peak_bytes=4 << 20))
    lines = table({"machine": MACHINE, "rows": rows}, "integrations").splitlines()
    assert lines[-2] == "| A | 2.00 s | 2.00 s | **1.00×** | 500 ms | **4.00×** | 3 MiB | 3 MiB | 4 MiB |"
    assert lines[-1] == "| B | 2.00 s | 2.00 s | **1.00×** | – | – | 3 MiB | 3 MiB | – |"
    assert all(line.count("|") == 10 for line in lines[2:])


def test_against_torch_compile() -> None:
    rows = [row("magnet", "one", path, seconds) for path, seconds in (("plain", 2.0), ("torch.compile", 0.75))]
    rows += [row("magnet", "one", "cpu", 0.00125), row("magnet", "two", "plain", 1.0), row("magnet", "two", "cpu", 1.0)]
    lines = compiled_table({"machine": MACHINE, "rows": rows}, "magnet").splitlines()
    assert lines[-1] == "| one | 2.00 s | 750 ms | 1.25 ms | 1600.00× | **600.00×** |" and len(lines) == 5
    rows.insert(3, row("magnet", "one", "cpu, torch.compile", 0.001))
    lines = compiled_table({"machine": MACHINE, "rows": rows}, "magnet").splitlines()
    assert lines[-1].endswith("| **600.00×** | 1 ms |") and lines[2].endswith("| ours, compiled |")


def test_against_every_rival() -> None:
    rows = [
        row("systems", "one", path, seconds, ratio=2.0 / seconds, peak_bytes=2 << 20)
        for path, seconds in (("plain", 2.0), ("cpu", 1.5), ("cpu, packed weights", 1.0), ("OpenVINO", 0.8))
    ]
    rows[2] |= {"product_share": 0.4, "copy_share": 0.7}
    rows += [row("systems", "two", path, 1.0, ratio=1.0) for path in ("plain", "cpu")]
    lines = rivals_table({"machine": MACHINE, "rows": rows}, "systems").splitlines()
    one = "| one | 2.00 s | 1.00 s | – | 800 ms | – | **2.00×** | 0.80× | 70 % | 2 MiB | 2 MiB |"
    assert lines[-2:] == [one, "| two | 1.00 s | 1.00 s | – | – | – | **1.00×** | – | – | – | – |"]
