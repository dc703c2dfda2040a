"""Tokenizers: upstream's ids whatever pipeline the file stores, text that stays text, streams that only grow."""

import json
import random
import shutil
from pathlib import Path

import pytest
from common import asked, script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import engine
from weights import InputError
from weights.text import Text, TextStream

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "weights" / "tiny"
TINY = PAIR / "target" / "tokenizer.json"
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"
needs_llama = pytest.mark.skipif(not TOKENIZER.exists(), reason=f"{TOKENIZER} is not here: no recorded ids to compare")


@needs_llama
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_hub_file_style.json"])
def test_tokenizer_vectors_whatever_pipeline_the_file_stores(name):
    vectors, text = json.loads((TOKENIZER / "vectors.json").read_text()), Text(TOKENIZER / name)
    for row in vectors["plain"]:
        if not any(s in row["text"] for s in ("<s>", "</s>", "<unk>", "<image>", "<video>", "<pad>")):
            assert [1] + text.ids(row["text"]) == row["ids"], row["text"]
    for row in vectors["prompts"]:
        parts = row["text"].split("<video>")
        if len(parts) == 2 and "<image>" not in row["text"] and "</s>" not in row["text"]:
            ids = [1] + text.ids(parts[0]) + [32001] + text.ids(parts[1], first=False)
            assert ids == row["transformers_ge_4_42"], row["text"]


@needs_llama
def test_placeholders_typed_by_a_user_stay_text():
    text = Text(TOKENIZER / "tokenizer.json")
    ids = text.ids("\nwhat is <video> or </s> or <event>?", first=False)
    assert not {0, 1, 2, 32000, 32001, 32002} & set(ids)
    assert text.decode(ids).strip() == "what is <video> or </s> or <event>?"


@needs_llama
def test_streamed_text_is_append_only_and_flushes_its_tail():
    text = Text(TOKENIZER / "tokenizer.json")
    ids = text.ids("A red car \U0001f697 drives caf\u00e9 \u4f60")
    for cut in range(len(ids) + 1):
        stream, pieces = TextStream(text), []
        for i in ids[:cut]:
            pieces.append(stream.push([i]))
        pieces.append(stream.push([], end=True))
        assert "".join(pieces) == text.decode(ids[:cut])


@pytest.mark.parametrize("question", ["<video> and <image>", "</s><s><unk><pad>", "a \u2581 b", "", "\n", "\U0001f697"])
def test_the_embedded_tokenizer_keeps_special_names_text_and_gives_text_back(question):
    text = Text(TINY)
    ids = text.ids("x" + question, first=False)
    assert not {0, 1, 2, 512, 513, 514} & set(ids)
    assert text.decode(ids) == ("x" + question).replace("\u2581", " ")


def changed(folder, change):
    """The embedded tokenizer.json after `change(raw)`."""
    raw = json.loads(TINY.read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))
    return folder / "tokenizer.json"


def test_nothing_random_is_left_in_a_tokenizer(tmp_path):
    text = Text(changed(tmp_path, lambda raw: raw["model"].update(dropout=0.5)))
    assert {tuple(text.ids("What is in this scene?")) for _ in range(30)} == {tuple(Text(TINY).ids(
        "What is in this scene?"))}


FAMILIES = {
    "WordPiece": (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(),
                  decoders.WordPiece()),
    "WordLevel": (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), pre_tokenizers.Whitespace(), None),
    "byte-level BPE": (models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []),
                       pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_of_another_family_is_refused(tmp_path, name):
    model, pre_tokenizer, decoder = FAMILIES[name]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not a LLaMA-style tokenizer|not a usable tokenizer"):
        Text(tmp_path / "tokenizer.json")


def added(content, i, special=False):
    return {"id": i, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}


def test_every_id_that_a_text_can_make_is_below_its_size(tmp_path):
    assert Text(TINY).size == 512                            # <image>, <video>, <pad> are beyond and never come up
    text = Text(changed(tmp_path, lambda raw: raw["added_tokens"].append(added("zebra", 515))))
    assert text.ids("a zebra")[-1] == 515 and text.size == 516 and text.decode([515]) == "zebra"


def test_typed_markers_stay_text_whether_or_not_the_file_calls_them_special(tmp_path):
    def plain(raw):
        for token in raw["added_tokens"]:
            token["special"] = False
    text, question = Text(changed(tmp_path, plain)), "<video> and </s> or <image>?"
    assert text.size == 512 and not {0, 1, 2, 512, 513, 514} & set(text.ids(question, first=False))
    assert text.decode(text.ids(question, first=False)) == question


def test_a_text_is_a_function_of_its_ids_however_they_come():
    """Random ids with long runs of bytes, valid and not, cut anywhere: what a stream showed is never taken back."""
    text, chance = Text(TINY), random.Random(0)
    byte = {b: text.head.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    for _ in range(400):
        ids = []
        while len(ids) < 24:
            ids += chance.choice([[chance.randrange(576)], [byte[b] for b in "\u6f22\U0001f697".encode()],
                                  [byte[chance.randrange(256)] for _ in range(chance.randrange(4))],
                                  [byte[b] for b in "\u6f22".encode()[:chance.randrange(4)]], [2], text.ids("a car")])
        for cut in (len(ids), chance.randrange(len(ids))):
            for step in (1, 3, cut or 1):
                stream, seen = TextStream(text), ""
                for at in range(0, cut, step):
                    seen += stream.push(ids[at:min(at + step, cut)])
                    assert text.decode(ids[:cut]).startswith(seen)
                assert seen + stream.push([], end=True) == text.decode(ids[:cut]) == stream.out


@pytest.mark.parametrize("mode", ["target_only", "drafter_only", "prefill_only", "prefill_then_verify", "speculative"])
def test_a_text_is_a_function_of_its_ids_in_every_mode(pair, monkeypatch, mode):
    """Answers of bytes, valid and not, cut by max_new_tokens wherever it falls, with right and wrong drafts."""
    text, chance = pair.target.text, random.Random(mode)
    byte = {b: text.head.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    for seed in range(4):
        ids = []
        while len(ids) < 20:
            ids += chance.choice([[byte[b] for b in "\u6f22\U0001f697".encode()], [byte[chance.randrange(256)]] * 3,
                                  [byte[b] for b in "\u6f22".encode()[:2]], text.ids("a car"), [513]])
        ids, cut = [i for i in ids if i != 2], chance.randrange(1, 20)
        with monkeypatch.context() as patch:
            script(patch, pair.target, ids)
            script(patch, pair.drafter, ids if seed % 2 else ids[:3] + ids)
            seen = {"preview": "", "final": ""}
            for event in pair.stream(mode=mode, **asked(0) | {"max_new_tokens": cut}):
                seen[event.kind] += event.delta
                result = event.result
        assert mode == "drafter_only" or result.output_ids == ids[:cut]
        shown = seen["preview"] * (mode == "drafter_only") + seen["final"]
        assert result.output_text == text.decode(result.output_ids) == shown


def test_words_are_shown_at_once():
    text = Text(TINY)
    stream = TextStream(text)
    assert "".join(stream.push([i]) for i in text.ids("A red car.")) == "A red car."


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "<!DOCTYPE html>", '{"model": {"type": "BPE"}}', "version"])
def test_a_broken_tokenizer_is_one_line_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        Text(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_tokenizers_raise_nothing_else(tmp_path):
    """500 mutations, seeded: each either loads and encodes or is an InputError, panics of the library included."""
    rng, raw, path, refused = random.Random(0), TINY.read_bytes(), tmp_path / "tokenizer.json", 0
    for _ in range(500):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            fresh = bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 8))))
            damaged[at:at + rng.choice((1, 1, 8, 200))] = fresh
        path.write_bytes(damaged)
        try:
            Text(path).ids("USER: what is there?")
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert 0 < refused


def test_a_missing_tokenizer_says_where_to_get_one(tmp_path):
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):         # as with Vicuna; none is meant
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="copy the Video-LLaVA checkpoint's, no tokenizer.model; check"):
        Text(tmp_path / "tokenizer.json")


def test_a_pair_whose_tokenizers_number_pieces_otherwise_is_told_in_one_line(tmp_path, caplog):
    """The drafter's drafts are then another text's ids: 0 accepted is also what an honest pair may show."""
    raw = json.loads((PAIR / "drafter" / "tokenizer.json").read_text())
    a, b = "\u2581circle", "\u2581moving"
    vocab = raw["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    shutil.copytree(PAIR / "drafter", tmp_path / "d")
    engine.load_engine(PAIR / "drafter", PAIR / "target", device="cpu")
    assert not caplog.records, "equal ones are nothing to speak of"
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(raw))
    engine.load_engine(tmp_path / "d", PAIR / "target", device="cpu")
    (told,) = caplog.records
    assert "2 pieces" in told.getMessage() and "\n" not in told.getMessage()
