"""`make docs`: writes the pages, tables and pictures that are made."""

import json
from pathlib import Path
from typing import Any

from flows.report.files import draw_sweep
from tests.pages import file_map, headline, stage_table
from tests.pages.marked import replaced


def made() -> dict[Path, str]:
    """Every page that is made, wholly or in part, with what it has to be."""
    return {
        headline.README: replaced(headline.README, "results", headline.render_headline()),
        headline.PAGE: replaced(headline.PAGE, "smollm2", headline.render_all()),
        stage_table.PAGE: replaced(stage_table.PAGE, "stages", stage_table.render()),
        file_map.PAGE: file_map.render(),
    }


def recorded() -> dict[Path, list[dict[str, Any]]]:
    """Every file of results on record, with its runs."""
    files = sorted((file_map.ROOT / "docs" / "results").glob("*/results.json"))
    return {file: json.loads(file.read_text(encoding="utf-8")) for file in files}


def main() -> None:
    """Writes all of them; pictures from every ``results.json``."""
    for page, text in made().items():
        page.write_text(text, encoding="utf-8")
    for file, runs in recorded().items():
        draw_sweep(runs, file.with_name("perplexity.png"))


if __name__ == "__main__":
    main()
