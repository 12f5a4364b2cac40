"""Tokenizers: bytes, Hugging Face folders and GGUF files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.user_errors import user_error

CORPUS = [
    "The theorem that 2024 = 2 * 1012, isn't it? It's 12345 of them.",
    "def f(x):\n    return x ** 2 + 10\n\n\nHELLO WORLD'S ÜBER naïve 日本語 ½ ٣\r\n",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS % digits), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# As in the tokenizer.json of SmolLM2, Llama 3, Qwen 2 and GPT-2.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "llama-bpe": split_words("{1,3}"),
    "qwen2": split_words(""),
    "gpt-2": pre_tokenizers.ByteLevel(False),
}


def trained(pre: str) -> tokenizers.Tokenizer:
    """Return a small byte-level BPE whose merges depend on the pre-tokenizer `pre`."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    return backend


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_gguf(path: Path, backend: tokenizers.Tokenizer, pre: str, **more: Any) -> Path:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(more.pop("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(more.pop("merges", [" ".join(pair) for pair in model["merges"]]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "héllo  \n日本 \x00 don't"
    assert tokenizer.encode_batch([text, ""]) == [list(text.encode()), []]
    assert tokenizer.encode_documents([text]) == [[*text.encode(), 256]]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.decode([*b"ab", 256]) == "ab<|endoftext|>"
    assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"
    small = load_tokenizer("bytes", model_vocab_size=256)
    assert (small.vocab_size, small.eos_id) == (256, None)
    assert small.encode_documents(["ab"]) == [list(b"ab")]
    assert "ids up to 255" in user_error(lambda: load_tokenizer("bytes", model_vocab_size=255))


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8")))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    (ids,) = tokenizer.encode_batch([text])
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


TRICKY = [
    *CORPUS[:2],
    " 12345 1 22 333\t\t x²  y   ",
    "WE'LL we'll e\u0301 \u00a0\u3000;;\r\n\r\n end  ",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_tokenizer_gives_the_ids_of_the_original(tmp_path: Path, pre: str) -> None:
    original = trained(pre)
    path = write_gguf(tmp_path / "model.gguf", original, pre, add_bos_token=False)
    tokenizer = load_tokenizer("model", path, 400)
    expected = [original.encode(text).ids for text in TRICKY]
    assert tokenizer.encode_batch(TRICKY) == expected
    assert [original.decode(ids, False) for ids in expected] == [
        tokenizer.decode(ids) for ids in expected
    ]
    # Other pre-tokenizers give other ids for these texts.
    for other in PRE_TOKENIZERS.keys() - {pre}:
        path = write_gguf(tmp_path / f"{other}.gguf", original, other)
        assert load_tokenizer("model", path).encode_batch(TRICKY) != expected


def test_gguf_special_tokens(tmp_path: Path) -> None:
    backend = trained("smollm")
    path = write_gguf(tmp_path / "a.gguf", backend, "smollm", chat_template="{{ messages }}")
    tokenizer = load_tokenizer("model", path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode_documents(["a"])[0][-1] == 2
    path = write_gguf(tmp_path / "b.gguf", backend, "smollm", add_bos_token=True)
    tokenizer = load_tokenizer("model", path)
    assert tokenizer.encode_documents(["a"])[0][::2] == [1, 2]
    # Llama 3 adds its bos to documents if the file has no setting.
    path = write_gguf(tmp_path / "c.gguf", trained("llama-bpe"), "llama-bpe")
    assert load_tokenizer("model", path).adds_bos


def test_unsupported_gguf_tokenizers_are_refused(tmp_path: Path) -> None:
    backend = trained("smollm")
    path = write_gguf(tmp_path / "a.gguf", backend, "tekken")
    assert "'gpt2' with pre-tokenizer 'tekken'" in user_error(lambda: load_tokenizer("model", path))
    path = write_gguf(tmp_path / "c.gguf", backend, "smollm", merges=["zz zz"])
    assert "the merges of its tokenizer do not match" in user_error(
        lambda: load_tokenizer("model", path)
    )
    (tmp_path / "d.gguf").write_bytes(b"GGUF")
    assert "cannot be read as GGUF" in user_error(
        lambda: load_tokenizer("model", tmp_path / "d.gguf")
    )
    (tmp_path / "e.gguf").write_bytes(b"something else, and long enough for a header")
    assert "cannot be read as GGUF" in user_error(
        lambda: load_tokenizer("model", tmp_path / "e.gguf")
    )


def test_huggingface_folder(tmp_path: Path) -> None:
    backend = trained("smollm")
    settings = {
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": "<|im_start|>",
        "chat_template": [{"name": "default", "template": "D"}, {"name": "x", "template": "X"}],
    }
    folder = write_folder(tmp_path / "a", backend, tokenizer_config=settings)
    for tokenizer in (
        load_tokenizer("model", folder),
        load_tokenizer(str(folder)),
        load_tokenizer(str(folder / "tokenizer.json")),
    ):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
        assert tokenizer.chat_template == "D"
        assert tokenizer.encode_documents(["a 12"]) == [[*backend.encode("a 12").ids, 2]]
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(str(folder)).chat_template == "J"


def with_bos(backend: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    """Return `backend` with a post-processor that begins texts with `bos`."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


@pytest.mark.parametrize("setting", [None, True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_determines_the_bos(
    adds: bool, setting: bool | None, tmp_path: Path
) -> None:
    backend = with_bos(trained("smollm"), SPECIAL[1]) if adds else trained("smollm")
    settings = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0]}
    settings |= {} if setting is None else {"add_bos_token": setting}
    folder = write_folder(tmp_path / "a", backend, tokenizer_config=settings)
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.encode_documents(["a"])
    assert tokenizer.adds_bos == adds
    assert ids == [1] * adds + tokenizer.encode_rendered(["a"])[0] + [0]
    # A text that begins with the bos gets no second one.
    assert tokenizer.encode_batch([f"{SPECIAL[1]}a"]) == [[1, *tokenizer.encode_rendered(["a"])[0]]]


TOKENS = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
SETTINGS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    (TOKENS, None),
    (TOKENS | {"bos_token": None, "pad_token": "<PAD>", "my_token": SPECIAL[0]}, None),
    ({}, TOKENS),
    (TOKENS, {"bos_token": SPECIAL[2], "eos_token": {"content": SPECIAL[0]}}),
    (TOKENS | {"added_tokens_decoder": {}}, {"bos_token": SPECIAL[2]}),
]


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("PreTrainedTokenizerFast", "llama"),
        ("LlamaTokenizer", "llama"),
        ("LlamaTokenizerFast", "mistral"),
        ("GPT2Tokenizer", "gpt2"),
        ("GPTNeoXTokenizerFast", "gpt_neox"),
        ("Qwen2Tokenizer", "qwen2"),
        *((None, name) for name in ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3")),
    ],
)
def test_special_tokens_are_those_of_transformers(
    class_name: str | None, model_type: str, adds: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    backend = with_bos(trained("gpt-2"), SPECIAL[1]) if adds else trained("gpt-2")
    for number, (named, special_map) in enumerate(SETTINGS):
        files: dict[str, Any] = {"config": {"model_type": model_type}}
        files["tokenizer_config"] = {**named, "add_bos_token": not adds}
        if class_name is not None:
            files["tokenizer_config"]["tokenizer_class"] = class_name
        if special_map is not None:
            files["special_tokens_map"] = special_map
        folder = write_folder(tmp_path / str(number), backend, **files)
        expected = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.encode_batch(["ab"]) == [expected("ab").input_ids]
        assert tokenizer.special_tokens == {
            name: token
            for name, token in expected.special_tokens_map.items()
            if name in named or token in backend.get_vocab()
        }
        assert (tokenizer.bos_id, tokenizer.eos_id) == (
            expected.bos_token_id,
            expected.eos_token_id,
        )


def test_null_is_no_token(tmp_path: Path) -> None:
    settings = {"bos_token": None, "eos_token": None}
    config = {"bos_token_id": 1, "eos_token_id": 2}
    folder = write_folder(
        tmp_path / "a", trained("smollm"), tokenizer_config=settings, config=config
    )
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_special_tokens_default_to_those_of_the_model(tmp_path: Path) -> None:
    backend = trained("smollm")
    config = {"eos_token_id": [2, 0], "bos_token_id": 1}
    folder = write_folder(tmp_path / "a", backend, config=config)
    assert (load_tokenizer(str(folder)).eos_id, load_tokenizer(str(folder)).bos_id) == (2, 1)
    bare = write_folder(tmp_path / "b", backend)
    assert load_tokenizer(str(bare)).eos_id is None
    assert load_tokenizer(str(bare)).encode_documents(["a"]) == [backend.encode("a").ids]


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    backend = trained("smollm")
    expected = [backend.encode(text).ids for text in TRICKY]
    backend.enable_truncation(3)
    backend.enable_padding(length=200)
    tokenizer = load_tokenizer(str(write_folder(tmp_path / "a", backend)))
    assert tokenizer.encode_batch(TRICKY) == expected


def test_errors_name_the_file(tmp_path: Path) -> None:
    assert "needs the path of a pretrained model" in user_error(lambda: load_tokenizer("model"))
    missing = tmp_path / "none"
    assert f"{missing} does not exist" in user_error(lambda: load_tokenizer(str(missing)))
    assert f"{tmp_path / 'tokenizer.json'}" in user_error(lambda: load_tokenizer("model", tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    message = user_error(lambda: load_tokenizer(str(tmp_path)))
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: not a tokenizer.json")
    folder = write_folder(tmp_path / "a", trained("smollm"), tokenizer_config={"eos_token": "</s>"})
    assert "eos_token '</s>'" in user_error(lambda: load_tokenizer(str(folder)))
    for wrong in (5, ["</s>"], {"content": 5}):
        write_folder(tmp_path / "a", trained("smollm"), tokenizer_config={"eos_token": wrong})
        assert f"{folder}: eos_token " in user_error(lambda: load_tokenizer(str(folder)))
    write_folder(tmp_path / "b", trained("smollm"), config={"eos_token_id": ["5"]})
    assert "eos_token_id is ['5']" in user_error(lambda: load_tokenizer(str(tmp_path / "b")))
    for content, problem in (("{", "not JSON"), ("[]", "not a JSON object")):
        (folder / "tokenizer_config.json").write_text(content)
        assert f"tokenizer_config.json: {problem}" in user_error(
            lambda: load_tokenizer(str(folder))
        )


def test_ids_outside_the_vocabulary_of_the_model_are_refused(tmp_path: Path) -> None:
    backend = trained("smollm")
    size = backend.get_vocab_size()
    folder = write_folder(tmp_path / "a", backend)
    assert load_tokenizer(str(folder), model_vocab_size=size).vocab_size == size
    message = user_error(lambda: load_tokenizer(str(folder), model_vocab_size=size - 1))
    assert f"ids up to {size - 1}" in message and f"ends at {size - 2}" in message
    # The largest id counts, even if ids below it are unused.
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["unused"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(folder)).vocab_size == 1001


def test_the_fingerprint_depends_on_the_ids(tmp_path: Path) -> None:
    backend = trained("smollm")
    names = [{"eos_token": token} for token in SPECIAL[:2]]
    names.append({"eos_token": SPECIAL[0], "bos_token": SPECIAL[1], "add_bos_token": True})
    folders = [
        write_folder(tmp_path / str(index), backend, tokenizer_config=content)
        for index, content in enumerate(names)
    ]
    folders.append(write_folder(tmp_path / "x", trained("gpt-2"), tokenizer_config=names[0]))
    fingerprints = [load_tokenizer(str(folder)).fingerprint for folder in folders]
    assert len(set(fingerprints)) == len(fingerprints)
    template = names[0] | {"chat_template": "x"}  # does not change the ids
    same = write_folder(tmp_path / "y", backend, tokenizer_config=template)
    assert load_tokenizer(str(same)).fingerprint == fingerprints[0]


def check_same(tokenizer: Tokenizer, expected: Tokenizer) -> None:
    assert tokenizer.encode_documents(TRICKY) == expected.encode_documents(TRICKY)
    assert tokenizer.fingerprint == expected.fingerprint
    assert tokenizer.chat_template == expected.chat_template


def test_saved_files_give_the_same_tokenizer(tmp_path: Path) -> None:
    backend = trained("llama-bpe")
    path = write_gguf(tmp_path / "a.gguf", backend, "llama-bpe", chat_template="C")
    for name, tokenizer in (
        ("gguf", load_tokenizer("model", path)),
        ("bytes", load_tokenizer("bytes")),
    ):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        check_same(load_tokenizer(str(tmp_path / name)), tokenizer)


def test_loaded_files_are_saved(tmp_path: Path) -> None:
    """All of them, and a file with another name in place of the folder's tokenizer.json."""
    settings = {"eos_token": "<|im_end|>", "unknown_setting": 1}
    folder = write_folder(tmp_path / "a", trained("gpt-2"), tokenizer_config=settings)
    for name in ("tokenizer.model", "merges.txt", "chat_template.jinja", "notes.txt"):
        (folder / name).write_text(name)
    trained("smollm").save(str(folder / "other.json"))
    saved = {}
    for name in ("tokenizer.json", "other.json"):
        tokenizer = load_tokenizer(str(folder / name))
        tokenizer.save(directory := tmp_path / f"copy of {name}")
        check_same(load_tokenizer(str(directory)), tokenizer)
        assert json.loads((directory / "tokenizer_config.json").read_text()) == settings
        assert (directory / "tokenizer.json").read_bytes() == (folder / name).read_bytes()
        saved[name] = {path.name for path in directory.iterdir()}
    assert saved["other.json"] == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert saved["tokenizer.json"] == saved["other.json"] | {"tokenizer.model", "merges.txt"}
    replaced = replace(tokenizer, chat_template="T")
    replaced.save(other := tmp_path / "replaced")
    assert load_tokenizer(str(other)).chat_template == "T"
    assert not (other / "chat_template.jinja").exists()
