"""`python -m tools.catalogue docs` writes the pages into `docs/recipes/`."""

import sys
from pathlib import Path

from tools.catalogue.pages import pages

docs = Path(sys.argv[1])
(docs / "recipes").mkdir(exist_ok=True)
for name, text in pages(docs).items():
    (docs / "recipes" / f"{name}.md").write_text(text)
