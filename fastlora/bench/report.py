"""A benchmark's report as files: JSON, and from the JSON alone Markdown, pictures and one self-contained HTML page."""

import base64
import html
import json
from pathlib import Path

from fastlora.bench.names import ADDED, SECTIONS
from fastlora.bench.run import lowest_cpu_share
from fastlora.bench.tables import report_tables
from fastlora.bench.verdict import verdict
from fastlora.files import write_file

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{border:1px solid #ccc;padding:.2rem .5rem}
th{background:#f3f3f3;text-align:left}img{max-width:100%}"""

KEYS = {"command", "preset", "environment", "peaks", "missing", "seconds", *SECTIONS} - set(ADDED)


def environment_lines(report: dict) -> list[str]:
    """The facts that a number is worthless without."""
    env = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number)
    lines = [
        f"Device: {env['device_name']}, {env['cpu_threads']} CPU threads",
        f"Versions: Python {env['python']}, {versions}",
        f"Commit: {env['commit'] or 'not a checkout'}; date: {env['date']}; took {report['seconds']} s",
        f"Command: {report['command']}",
    ]
    if "gpu" in env:
        lines.insert(1, "GPU: " + ", ".join(f"{name} {value}" for name, value in env["gpu"].items()))
    peaks = ", ".join(f"{value:.4g} TFLOP/s ({name})" for name, value in report["peaks"]["matmul_tflops"].items())
    lines.insert(-1, f"Measured peaks: copy {report['peaks']['copy_gbs']:.4g} GB/s, matrix product {peaks}")
    share = lowest_cpu_share(report)
    if share is not None:
        lines.append(f"The timed work had {share:.0%} of a CPU at worst; what it lacked to 100% ran beside it")
    if "unfinished" in report:
        lines.append(f"Not finished: {report['unfinished']}")
    return lines


def load_report(path: Path) -> dict:
    """Reads a report's JSON.

    Raises:
        ValueError: the file is not a report of this format.
    """
    try:
        report = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("format") != 1 or KEYS - report.keys():
        raise ValueError(f"{path} is not a report of fastlora bench")
    return report


def write_report(report: dict, directory: Path) -> list[Path]:
    """Writes bench.json, bench.md, the pictures and bench.html into the directory; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / "bench.json", directory / "bench.md", directory / "bench.html"]
    # The JSON first: from it all the rest can be made again.
    write_file(files[0], (json.dumps(report, indent=1) + "\n").encode())
    tables, facts = report_tables(report), environment_lines(report)
    pictures = _pictures(report, directory)
    if pictures is None:
        facts.append("Pictures: none for want of matplotlib; `fastlora bench --from bench.json` draws them where it is")
    title = f"fastlora bench, {report['preset']}: {report['environment']['device_name']}"
    result = verdict(report)
    first, *others = [f"![{path.stem}]({path.name})" for path in pictures or ()] or [""]
    text = [f"# {title}", "", result, "", first, "", *(f"- {fact}" for fact in facts), "", *others]
    files[1].write_text("\n".join([*text, "", *(table.to_markdown() for table in tables)]))
    files[2].write_text(_page(title, result, facts, pictures or [], [table.to_html() for table in tables]))
    return [*files, *(pictures or ())]


def _pictures(report: dict, directory: Path) -> list[Path] | None:
    """The pictures drawn; None where matplotlib is not installed."""
    try:
        from fastlora.bench.plots import draw_all
    except ImportError:
        return None
    return draw_all(report, directory)


def _page(title: str, result: str, facts: list[str], pictures: list[Path], tables: list[str]) -> str:
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    images = [
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">\n'
        for path in pictures
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><p><strong>{html.escape(result)}</strong></p>\n"
        + "".join(images[:1])
        + f"<h1>{html.escape(title)}</h1><ul>{items}</ul>\n"
        + "".join([*images[1:], *tables])
        + "</body></html>\n"
    )
