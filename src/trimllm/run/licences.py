"""The terms of a base: its licence, and the files that go wherever its weights go."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from trimllm.checkpoints import belongings, loading
from trimllm.checkpoints.loading import quiet
from trimllm.checkpoints.origin import Origin
from trimllm.offline import hub_or_cache

LICENCE_FILES = tuple(f"{name}{end}" for name in ("LICENSE", "LICENCE") for end in ("", ".txt", ".md"))
"""Names under which a base may have its licence."""
LICENCES = (
    (r"apache license", "apache-2.0"),
    (r"mit license", "mit"),
    (r"gnu affero general public license\s+version 3", "agpl-3.0"),
    (r"gnu lesser general public license\s+version 3", "lgpl-3.0"),
    (r"gnu lesser general public license\s+version 2\.1", "lgpl-2.1"),
    (r"gnu general public license\s+version 3", "gpl-3.0"),
    (r"gnu general public license\s+version 2", "gpl-2.0"),
)
"""What licence files begin with, in small letters -> their ids on the Hub."""


@dataclass(frozen=True)
class Licence:
    """The Hub's id of a licence, what metadata goes with it, and a sentence for the reader."""

    id: str
    more: dict[str, str]
    sentence: str


def licence(base: Origin) -> Licence:
    """The licence of a base, from its card, its config or its licence file; `other` where none of them says it."""
    name = base.found_at
    if (path := card_of(base)) is not None:
        data = read_card(path).data
        if isinstance(data.license, list):
            named = ", ".join(map(str, data.license))
            return Licence("other", {"license_name": "as-the-base"}, f"Licence: {named}, as the card of the base says.")
        if data.license:
            more = {k: v for k in ("license_name", "license_link") if (v := data.get(k))}
            named = more.get("license_name", data.license)
            return Licence(str(data.license), more, f"Licence: {named}, as the card of the base says.")
    if (path := _file(name, "config.json")) is not None:
        named = json.loads(path.read_text(encoding="utf-8")).get("license")
        if isinstance(named, str) and named:
            return Licence(named, {}, f"Licence: {named}, as the config of the base says.")
    for file in LICENCE_FILES:
        if (path := _file(name, file)) is not None:
            start = path.read_text(encoding="utf-8", errors="replace")[:400].lower()
            for words, known in LICENCES:
                if re.search(words, start):
                    return Licence(known, {}, f"Licence: {known}, as the file {file} of the base says.")
            more = {"license_name": "as-the-base", "license_link": file}
            return Licence("other", more, f"Licence: that of the base, in its file {file}; read it before you publish.")
    return Licence(
        "other",
        {"license_name": "unknown"},
        "Licence: unknown, since the base names none where it was read; the terms of the base hold here, too.",
    )


def terms(base: Origin) -> list[Path]:
    """The licence and notice files of a base, as far as it has some and they can be had."""
    name = base.found_at
    folder = Path(loading.path_of(name))
    if folder.is_dir():
        return belongings.found(folder, belongings.TERMS)
    return [path for file in (*LICENCE_FILES, "NOTICE") if (path := _file(name, file)) is not None]


def card_of(base: Origin) -> Path | None:
    """The card of a base, if it has one that can be had."""
    return _file(base.found_at, "README.md")


def read_card(path: Path) -> Any:
    """A card, without metadata where it has none or they cannot be read: that of a base is not ours to mend."""
    text = path.read_text(encoding="utf-8", errors="replace")
    with quiet():  # the Hub's library says on the console what it does not find
        try:
            return ModelCard(text, ignore_metadata_errors=True)
        except (ValueError, TypeError, YAMLError):
            return ModelCard(f"<!-- -->\n{text}", ignore_metadata_errors=True)


def _file(base: str, name: str) -> Path | None:
    """A file of the base: in its folder, in the cache of the Hub, or on the Hub if it can be reached."""
    folder = Path(loading.path_of(base))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        with hub_or_cache():
            return Path(hf_hub_download(base, name))
    except Exception:  # not there, no access, no network, not an id: in each case nothing is known from it
        return None
