"""MkDocs hook: each notebook of `docs/notebooks/` as a page, with the outputs that it holds."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for notebook in list(files):
        if notebook.src_uri.endswith(".ipynb"):
            page, pictures = describe_notebook(Path(notebook.abs_src_path or ""))
            files.append(File.generated(config, str(Path(notebook.src_uri).with_suffix(".md")), content=page))
            for name, picture in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def describe_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            else:
                parts.append(f"```text\n{''.join(output.get('text', output.get('data', {}).get('text/plain', '')))}```")
    parts.append(f"[The notebook, to run it]({path.name})")
    return "\n\n".join(parts) + "\n", pictures
