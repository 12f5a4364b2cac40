"""The files that describe a tokenizer in a Hugging Face directory."""

from pathlib import Path

from sat_jax.errors import UserError

# Settings, which hold for any vocabulary.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer files in a folder, by name."""
    paths = [folder / name for name in (*SETTINGS, *VOCABULARIES)]
    try:
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
