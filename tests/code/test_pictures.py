"""Pictures in docs/ are what the scripts draw now."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def test_the_picture_of_cut_sequences_is_drawn_by_its_script():
    drawn = runpy.run_path(str(ROOT / "scripts" / "context_picture"))["picture"]()
    assert (ROOT / "docs" / "context.svg").read_text(encoding="utf-8") == drawn
    sizes = ElementTree.fromstring(drawn)
    wide, tall = float(sizes.attrib["width"]), float(sizes.attrib["height"])
    boxes = [element.attrib for element in sizes.iter() if element.tag.endswith("rect")]
    assert all(float(box.get("x", 0)) + float(box["width"]) <= wide for box in boxes)
    assert all(float(box.get("y", 0)) + float(box["height"]) <= tall for box in boxes)
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == len(boxes)  # none covers another
