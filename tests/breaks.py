"""breaks: deliberate mistakes, each of which the tests named beside it must see.

    python tests/breaks.py                     every break; some minutes
    python tests/breaks.py --only round -n 2   those whose file, reason or tests hold the word, two at a time

Each is put into a copy of the tree, and only its tests run there. Printed are those that no test sees, and those whose
text no longer occurs exactly once; either makes the exit code 1. tests/test_breaks.py keeps the texts up to date."""

import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from weights.files import Parser, command  # noqa: E402  after the path

SECONDS = 300                        # for the tests of one break


@dataclass(frozen=True)
class Break:
    """`old` becomes `new` in `file`. why: what would be wrong. tests: arguments of pytest, run in tests/."""
    file: str
    old: str
    new: str
    why: str
    tests: str


def of(file, tests, *breaks):
    """Breaks of one file that the same tests catch: (old, new, why)."""
    return [Break(file, *each, tests) for each in breaks]


BREAKS = [
    # what a caller holds in memory
    *of("weights/given.py", "test_given.py",
        ("array.dtype.newbyteorder(\"=\")", "array.dtype", "big-endian numbers are refused"),
        ("array.flags.c_contiguous and ", "", "an array that runs backwards is refused"),
        ("from_numpy(array if plain", "from_numpy(array.copy() if plain", "torch would take this array as it is"),
        ("chosen = sample_indices(len(frames), num_frames, rule)", "chosen = [*range(min(len(frames), num_frames))]",
         "of many frames in memory the first are taken, whatever the rule"),
        ("~(exact.abs() < 2.0 ** 53)", "exact.isinf()", "times that are no number become some number"),
        ("picture if channels == [2] else picture.permute(1, 2, 0)", "picture.reshape(*sorted(picture.shape)[::-1])",
         "channels that come first are taken for rows"),
        ("columns or \"xytp\"", "\"xytp\"", "four arrays in another order are read as x, y, t, p"),
        ("kept.append(own(picture_of(value, max_pixels), pin))", "kept.append(picture_of(value, max_pixels))",
         "a frame changes when the caller writes over its array"),
        ("if not callable(mask) and mask is not False and mask.any():", "if False:",
         "masked values are taken as numbers"),
        ("getattr(value, \"_fields\", None)", "None", "a named tuple is read in our order"),
        ("(part := value.read(left)):", "len(parts) < 2 and (part := value.read(left)):",
         "of a file object that gives its content in parts the first is read"),
        ("back.callback(value.seek, value.tell())", "pass", "a file object can be asked about once")),
    *of("weights/text.py", "test_clip.py -k 'kept_elsewhere'",
        ("insist_whole(\"id\", i, 0, vocab - 1)", "int(i)", "a chat that is put back holds ids that no model knows")),
    *of("weights/files.py", "test_odd.py -k 'written_over or stdout_goes'",
        ("isinstance(path, int) else os.stat(path)", "isinstance(path, int) else os.lstat(path)",
         "a report replaces what its run reads, where a link leads there"),
        ("for fd, of in ((1, \"stdout\"), (2, \"stderr\"))", "for fd, of in ()",
         "a report that is printed into the file of --json is lost")),
    *of("bench.py", "test_odd.py -k 'costs_none or do_nothing or saved_report or way_out'",
        ("with contextlib.ExitStack() as left:  ", "with contextlib.nullcontext(contextlib.ExitStack()) as left:  ",
         "what a run is to write is not written"),
        ("        last.callback(save_answers, options)\n        return", "        return",
         "a full disk behind stdout costs the answers that were learnt"),
        ("!= (SCHEMA, list)", "is None", "a report of another schema is shown as one of this"),
        ("        if name != asked and name not in", "        if name == asked and name not in",
         "a flag beside --from-json does nothing, and nobody says so")),
    *of("weights/rows.py", "test_rows.py -k emptied",
        (" or start.endswith(b\"}\")", "", "a report named as --rows by mistake is emptied"),
        ("text.rpartition(\"\\n\") if \"\\n\" in text else (text, \"\", \"\")", "text.rpartition(\"\\n\")",
         "a header without its line end is begun anew")),
    *of("weights/events.py", "test_media.py -k 'bad_event_files'",
        ("                if name in columns:", "                if False:",
         "of two members x of a recording one is taken")),
    *of("weights/files.py", "test_engine_cli.py",
        ("return re.sub(r\"^(\\w+)(?=[:\\s[])|`(\\w+)`\", lambda of: flags.get(of[1] or of[2], of[0]), str(error))",
         "return str(error)", "a command names the library's arguments")),
    # stop strings, closing, other threads
    *of("weights/text.py", "test_stop.py",
        ("waits = [n for of in self.stops for n in range(1, len(of)) if whole.endswith(of[:n])]", "waits = []",
         "the beginning of a stop string is shown"),
        ("whole = whole[:min(found)[1]]", "whole = whole[:min(found)[0]]", "a stop string is shown"),
        ("whole = whole[:min(found)[1]]", "whole = whole[:min(at for _, at in found)]",
         "which stop string ends a text follows how its ids came in"),
        ("count = len(self.given) if end and not found else len(self.ids)", "count = len(self.given)",
         "the ids go on behind the text")),
    *of("weights/drafting.py", "test_stop.py",
        ("judged = result.preview_ids[:len(result.output_ids) if stopped else None]",
         "judged = [i for i, _ in req.preview]",
         "a head start is wrong where the answer was cut")),
    *of("engine.py", "test_api.py",
        ("            thread.shutdown()\n", "            pass\n", "a closed engine's threads live on"),
        ("        gc.collect()                                         # a graph", "        # a graph",
         "a closed engine's models stay in memory"),
        ("-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)", "-1", "a second thread waits for good"),
        ("            if os.getpid() == self.pid:                      # after", "            if True:  # after",
         "a forked child hangs when it leaves a stream"),
        ("with contextlib.closing(events):                         # also if that fails", "if True:",
         "what a callback raises leaves the request open")),
    # the accept rule: plain torch and kernel
    *of("kernels/round.py", "test_round.py",
        ("(ACCEPT_LEN, accept_len),", "(ACCEPT_LEN, accept_len + 1),", "the bonus id counts as an accepted draft"),
        ("ACCEPT_LEN, accept_len.to(tl.int64))", "ACCEPT_LEN, accept_len.to(tl.int64) + 1)",
         "the bonus id counts as an accepted draft, on the GPU"),
        ("(0x7FFFFFFF - col).to(tl.int64)", "col.to(tl.int64)", "the highest id wins a tie"),
        ("fresh = fresh if end is None else fresh[:end + 1]", "pass", "ids go on behind a stop id"),
        ("stops = stops | (target == tl.load(state_ptr + STOP + i))", "stops = stops",
         "ids go on behind a stop id, on the GPU"),
        ("tl.maximum(limit - n_out, 0)", "tl.maximum(limit - n_out, 0) + 1", "one id more than the limit"),
        ("max(0, most - state.n_out)", "max(0, most - state.n_out) + 1", "one id more than the limit, in plain torch"),
        ("if state.done:", "if False:", "a finished answer grows"),
        ("if done == 0:", "if done < 2:", "a finished answer grows, on the GPU"),
        ("state.nonfinite | int(logits_SV.isnan().any())", "int(logits_SV.isnan().any())",
         "NaN is forgotten by the next finite forward"),
        ("tl.load(state_ptr + NONFINITE) | nonfinite", "nonfinite",
         "NaN is forgotten by the next finite forward, on the GPU"),
        ("drafted, accept_len = min(len(state.slots), S - 1), 0", "drafted, accept_len = S - 1, 0",
         "stale words count as drafts"),
        ("drafted = tl.minimum(tl.load(state_ptr + FOUND), S - 1)", "drafted = S - 1 + tl.load(state_ptr + FOUND) * 0",
         "stale words count as drafts, on the GPU"),
        ("pos_ids_S = state.prompt_len + state.n_out - 1 +", "pos_ids_S = state.prompt_len + state.n_out +",
         "a forward's rows stand one place too late")),
    *of("kernels/lookup.py", "test_lookup.py",
        ("if self.at + len(ids) > self.rows:", "if self.at + len(ids) >= self.rows:",
         "an answer that just fits overwrites the oldest"),
        ("pin_memory=self.mail is not None).fill_(-1)", "pin_memory=self.mail is not None)",
         "memory that nobody wrote is taken for ids"),
        ("(place_M - ring.at) % rows", "(ring.at - place_M) % rows", "of equal contexts the oldest wins"),
        ("torch.where(fit_M == len(own),", "torch.where(fit_M > 0,", "the line drafts behind an id it does not hold"),
        ("place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)",
         "place = tl.program_id(0) * PLACES + tl.arange(0, PLACES) // 2 * 2", "every other place is not searched")),
    *of("kernels/sample.py", "test_sample.py",
        ("at = (tl.load(state_ptr + N_OUT) + row)", "at = (tl.load(state_ptr + N_OUT) * 0 + row)",
         "a draw depends on the forward in which its row stood, on the GPU"),
        ("int(sampling_3[0]), state_W[0] + torch.arange", "int(sampling_3[0]), torch.arange",
         "a draw depends on the forward in which its row stood"),
        ("(mass_SV < top_p * mass_SV[:, -1:].double())", "(mass_SV < top_p * 0.5 * mass_SV[:, -1:].double())",
         "top_p keeps half the mass it should")),
    # what a row sees
    *of("kernels/attention.py", "test_attention.py",
        ("> pos_ids_S[:, None], float", "> pos_ids_S[:, None] + 1, float", "a row sees the row behind it"),
        ("(at[None, :] <= pos[:, None])", "(at[None, :] <= pos[:, None] + 1)",
         "a prefill's row sees the row behind it"),
        ("(at[:, None] <= pos[None, :])", "(at[:, None] <= pos[None, :] + 1)", "a step's row sees the row behind it")),
    *of("kernels/early.py", "test_early.py",
        ("max(2, min(6 if residual or S <= 8 else 3, ROOM // (beside * stage)))", "6",
         "two kernels no longer fit on a processor side by side")),
    *of("kernels/attention.py", "test_early.py",
        ("K in (64, 128, 256)", "K >= 16", "heads of an odd width go where there are no tiles for them")),
    *of("kernels/skinny.py", "test_early.py",
        ("S <= EARLY_ROWS", "S <= 2 * EARLY_ROWS", "rows that no block holds are left out of a product"),
        ("D % (128 if residual is None else 256) == 0", "D % 128 == 0", "half a tile's columns are lost")),
    *of("tests/chain.py", "test_chain.py",
        ("bytes_us + kernels * edge, us))", "bytes_us + edge, us))", "a table predicts another time than its total"),
        ("without=name)) / chain.L", "without=name))", "what a kernel costs is printed of all layers"),
        ("qkv_SE[:, :self.D] if without == \"attention\" else step_attention(", "step_attention(",
         "attention is timed with nothing left out")),
    *of("kernels/rmsnorm.py", "test_rmsnorm.py test_models.py -k rms",
        (".to(x_SD.dtype) * w_D", " * w_D.float()", "one rounding where upstream makes two")),
    *of("kernels/rope_store.py", "test_rope_store.py test_models.py -k 'rotary or rope'",
        ("torch.cat((-high, low), dim=-1)", "torch.cat((high, -low), dim=-1)", "rotary turns the other way")),
    # a drafter in 4 bits alone, and the memory that it all takes
    *of("kernels/unpack.py", "test_unpack.py",
        ("output = tile * 16 + g + 8 * row", "output = tile * 16 + 2 * g + row", "rows of a tile change places"),
        ("out = (block * 32 + t * 4)[:, None]", "out = (block * 32 + (3 - t) * 4)[:, None]", "columns change places")),
    *of("weights/packed.py", "test_drafter_dtype.py -k 'steps or turned'",
        ("yield name, torch.ones_like(tensor)", "yield name, tensor", "a folded norm is applied again")),
    *of("weights/packed.py", "test_packed.py -k 'bits_of'",
        ("norm_before(base) is not None)", "False)", "a saved weight forgets the norm in it")),
    *of("engine.py", "test_drafter_dtype.py -k 'turned'",
        ("if steps.turned:", "if steps.turned and rows <= steps.rows:",
         "a prefill on turned weights reads plain rows")),
    *of("weights/load.py", "test_packed.py -k 'one_matrix'",
        ("(len(job[2].shape) > 1, min(at[part.name] for part in job[2].parts), at[job[1].name])",
         "(len(job[2].shape) > 1, at[job[1].name])", "several matrices are half read at once"),
        ("(len(job[2].shape) > 1, min(", "(min(", "a norm may come after the weight that it is folded into")),
    *of("weights/memory.py", "test_clip.py -k 'several'",
        ("several * 2 * d.L", "(several - 1) * 2 * d.L", "the budget has no room for the last of several clips")),
    *of("weights/memory.py", "test_memory.py -k 'free or fit'",
        ("most = int(share * whole)", "most = whole", "a process's limit counts as free memory"),
        ("if bytes_of(sides) > min(", "if bytes_of(budget) > min(", "what lies on two cards must fit on one")),
    *of("weights/shapes.py", "test_memory.py -k 'caches or budget or fits'",
        ("SPARE_ROWS = 34 ", "SPARE_ROWS = 0 ", "a cache of the default size has no room for drafts"),
        ("wanted.nbytes(b) - kernels.pop(\"replaced\", 0)", "wanted.nbytes(b) - 0 * kernels.pop(\"replaced\", 0)",
         "the budget counts weights that a packed drafter does not have")),
    # what the models are shown
    *of("kernels/frames.py", "test_frames.py",
        ("COLOURS = ((0, 0, 255), (255, 0, 0))", "COLOURS = ((255, 0, 0), (0, 0, 255))",
         "polarity in the other colour"),
        ("(at % 3 == 0) & (key % 2 == 1) | (at % 3 == 2) & (key % 2 == 0)",
         "(at % 3 == 0) & (key % 2 == 0) | (at % 3 == 2) & (key % 2 == 1)", "polarity in the other colour, on the GPU"),
        ("num_events if i == num_frames - 1 else (i + 1) * step", "(i + 1) * step",
         "the last frame loses the remaining events")),
    *of("weights/text.py", "test_text.py test_models.py",
        ("tokenizer.encode_special_tokens = True", "tokenizer.encode_special_tokens = False",
         "typed text becomes a special id")),
    *of("weights/adapter.py", "test_adapter.py test_drafting.py -k adapter",
        ("len(committed) - config.shift,", "len(committed),", "the adapter guesses one place too late")),
    *of("weights/names.py", "test_load.py test_models.py",
        ('"self_attn.q_proj.weight", "self_attn.k_proj.weight"', '"self_attn.k_proj.weight", "self_attn.q_proj.weight"',
         "queries and keys change places")),
    *of("weights/names.py", "test_configs.py",
        ('"attention_bias": _only(False), ', '', "biases of a checkpoint are left out in silence"),
        ('for name in ("rope_scaling", "rope_parameters"))]', 'for name in ("rope_scaling",))]',
         "a rotary base in its newer home is not read")),
    *of("weights/files.py", "test_odd.py -k 'empty or long_as or raw or rank or any_value or callers_class'",
        ("        if not word or re.fullmatch", "        if re.fullmatch", "an empty value leaves its flag out"),
        (".{threading.get_ident()}.partial", ".partial", "two threads that write one file take each other's half"),
        ("    print(printable(text, \"\\n\"))", "    print(text)", "a file's name moves a terminal's cursor"),
        ("if re.fullmatch(\"[0-9]{1,9}\", text) else None", "if text.isdecimal() else None", "a rank of 5,000 digits"),
        ("        return spell(value)\n    except Exception:", "        return spell(value)\n    except LookupError:",
         "a value without a repr ends in its own exception"),
        ("    if len(items) > most:\n", "    if len(items) > most > 1000:\n",
         "a list without an end is cut in silence"),
        ("getattr(value, \"shape\", ()) == () and ", "", "a tensor of one element is a number, an array is none")),
    *of("weights/drafting.py", "test_faults.py -k 'source_raises'",
        ("    except BaseException as error:\n", "    except Exception as error:\n",
         "a source that is cancelled ends the request")),
    *of("engine.py", "test_odd.py -k 'callers_thread'",
        ("torch.device(\"cpu\"), torch.autocast(\"cpu\", enabled=False)", "torch.autocast(\"cpu\", enabled=False)",
         "a default device that the caller has set is where our tensors are made")),
    *of("weights/sources.py", "test_odd.py -k 'looked_into'",
        ("issubclass(type(source), (str, Lookup)) else", "isinstance(source, (str, Lookup)) else",
         "the class of a source decides whether it is one of our words")),
    *of("bench.py", "test_odd.py -k 'two_runs or no_report or question_ends'",
        ("        there.save(options.kept)", "        own.save(options.kept)",
         "of two runs on one saved lookup the answers of one are lost"),
        ("    for flag in OUTPUTS if shards > 1 else ():", "    for flag in (\"rows\",) if shards > 1 else ():",
         "two shards write one report"),
        ("        if kept.rows:   ", "        if not kept.rows:   ", "a damaged row costs the report at the end"),
        ("text.split(\"\\n\") if line.strip()", "text.splitlines() if line.strip()", "U+2028 cuts a question in two")),
    *of("weights/load.py", "test_load.py -k 'readers_fill'",
        ("                seen += extremes\n", "                seen = [*extremes]\n",
         "NaN in all but the last piece of a tensor is not found")),
    *of("weights/load.py", "test_load.py -k 'tied'",
        ('is True and "lm_head.weight" in stored', 'is None and "lm_head.weight" in stored',
         "a head of its own is taken for the embeddings")),
    *of("weights/load.py", "test_load.py -k 'zeros or something_else'",
        (" & (extremes.any() | (len(wanted.shape) < 2))", "", "the holes of a download are weights"),
        ("(dict.fromkeys(wanted) | edges).items()", "edges.items()", "half of a size is as good as all of it"),
        ("same_setting(of, wanted.get(name))", "same_setting(of, [*wanted.values()][0])",
         "a squeezed square passes for a cut one")),
    *of("weights/convert.py", "test_convert.py -k 'no_tensors'",
        ("if any(of.compress_type and", "if any(False and", "compressed bytes are mapped and pass for values")),
    # whether drafts pay
    *of("weights/drafting.py", "test_gate.py",
        ("for k in range(min(drafted, agreed + 1)):", "for k in range(drafted):",
         "what stood behind a rejected draft counts as wrong"),
        ("+ (k < agreed)]", "+ (k <= agreed)]", "a rejected draft counts as right"),
        ("return min(self.times[what]) if what", "return max(self.times[what]) if what",
         "a price is the most disturbed time"),
        ("if gain > max(late, 0.1 * step):", "if gain > 0.1 * step:", "a later first id is no part of the price"),
        ("sum(self.alive(\"head start\", question, most + 1)[1:]) * step", "most * step",
         "every draft of a head start is taken for right"),
        ("alive(kind, question, max(lens))", "alive(kind, question, 1) * max(lens)", "every draft is as likely as one"),
        ("min(2 * every, self.MOST_REFUSALS)", "every", "a refused source is tried as often as at first"),
        ("if place >= kept:", "if False:", "ids behind a rejected one count as wrong drafts"),
        ("self.ids, self.rows = list(ids), min(self.rows, kept)", "self.ids = list(ids)",
         "rows of rejected ids are taken for right ones")),
    *of("weights/sources.py", "test_gate.py",
        ("(a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))",
         "(a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))",
         "a longer list agrees with a shorter one beyond its end")),
    *of("weights/sources.py", "test_drafting.py -k 'looked_up or learnt or apart'",
        ("self.size, self.learnt = self.size + len(answer) + 1, self.learnt + 1",
         "self.size, self.learnt = self.size + len(answer) + 1, 1", "only the first answer reaches the device")),
    # what is read
    *of("weights/video.py", "test_media.py",
        ("[k * total // num_frames for k in range(num_frames)]",
         "[round(k * total / num_frames) for k in range(num_frames)]", "other frames than upstream's are shown"),
        ("if image.mode[0] in \"FI\":", "if image.mode in (\"F\", \"I\"):", "a picture of 16 bits is shown white")),
    *of("weights/video.py", "test_guards.py",
        ('"protocol_whitelist": "file"', '"protocol_whitelist": "file,http,tcp"', "a clip may open an address"),
        ("if decoded != total:", "if decoded <= indices[-1]:",
         "a frame count that nobody trusts decides which frames are shown"),
        ("if frame.pts in kept or frame.is_corrupt:", "if frame.pts in kept:",
         "a frame that FFmpeg calls corrupt is shown")),
    *of("weights/video.py", "test_media.py -k 'truncated or bad_videos'",
        ("if packet.is_corrupt:", "if False:", "half a packet passes for a frame")),
    *of("weights/files.py", "test_media.py test_convert.py -k 'bad_event or stored or no_tensors'",
        ("if first or len(end) != ZIP_END", "if len(end) != ZIP_END", "of two zips the last is read alone"),
        ("len(end) != ZIP_END + int.from_bytes(end[20:ZIP_END], \"little\")", "False",
         "bytes behind a zip are no matter"),
        (" + int.from_bytes(end[20:ZIP_END], \"little\")", "", "a zip with a comment is refused")),
    *of("weights/rows.py", "test_rows.py -k 'numbers'",
        ("if not -2 ** 63 < n < 2 ** 63)", "if False)", "a number of 400 digits stands in a report"),
        ("n >= 0 for n in lens)", "n < 1 << 62 for n in lens)", "fewer than no drafts are accepted"),
        ("sum(lens) > of[\"drafted\"]", "False", "more drafts are accepted than were made")),
    *of("weights/events.py", "test_media.py -k 'polarity'",
        ("codes > 0 if signed else codes", "codes != 0", "an event of polarity -1 becomes positive")),
    # the two models
    *of("engine.py", "test_models.py",
        ('layer = config.get("vision_feature_layer", -2)', 'layer = config.get("vision_feature_layer_", -1)',
         "the target reads the tower's last layer"),
        ("if image and not self.keep_cls:", "if not self.keep_cls:", "a video's CLS rows are dropped"),
        ('self.text.ids(f"\\n{question} ASSISTANT:", first=False))\n\n    def encode(self, pixels_R3XX, image',
         'self.text.ids(f"{question} ASSISTANT:", first=False))\n\n    def encode(self, pixels_R3XX, image',
         "the target's prompt lacks the newline behind <video>"),
        ("rows_RSC = self.tower(pixels_R3XX, self.vision.layers)",
         "rows_RSC = self.tower(pixels_R3XX, self.vision.layers - 1)",
         "the drafter reads the layer before the last"),
        ("hidden = torch.cat([hidden_RSD.mean(1), hidden_RSD.mean(0)])",
         "hidden = torch.cat([hidden_RSD.mean(0), hidden_RSD.mean(1)])", "spatial rows come before temporal ones"),
        ("normed_RSC, h_RSC = add_layernorm(fresh_RSC, h_RSC,", "normed_RSC, _ = add_layernorm(fresh_RSC, h_RSC,",
         "the tower's stream loses a block")),
    *of("weights/drafting.py", "test_result.py",
        ('gate.timed("draft", sum(rounds) / len(rounds))', 'gate.timed("draft", sum(rounds))',
         "the gate takes a round's drafts for one"),
        ('gate.timed(("first id", req.size, "drafter" in req.prompt_rows), result.ttft)',
         'gate.timed(("first id", req.size, True), result.ttft)', "the gate does not see what a head start delays")),
    # the loop, and what a Result says of it
    *of("weights/result.py", "test_result.py",
        ("/ (len(self.output_ids) - 1)", "/ len(self.output_ids)", "seconds an id counts the first id"),
        ("stages[of.stage] = stages.get(of.stage, 0.0) + of.end - of.start", "stages[of.stage] = of.end - of.start",
         "a stage's seconds are its last entry's"),
        ("drafts[:max(0, left)], min(accepted, max(0, left))", "drafts, accepted",
         "drafts behind the answer's end are counted"),
        ("self.accepted_tokens / self.drafted if", "self.accepted_tokens / max(1, self.rounds) if",
         "acceptance is over rounds and not over drafts"),
        ("self.accepted_tokens / self.rounds + 1 if log", "self.accepted_tokens / self.rounds if log",
         "a round's own id is not counted"),
        ("span.accepted if span and span.accepted < len(span.drafts) else -1", "span.accepted if span else -1",
         "a draft is called rejected where all were accepted")),
    *of("weights/result.py", "test_rows.py -k timed",
        ("accepted + 1, (end - begin)", "accepted, (end - begin)", "a round's own id is not counted"),
        ("own = len(drafts) - behind", "own = len(drafts)", "drafts of earlier answers count as the copy's"),
        ("min(own, accepted + 1), min", "own, min", "drafts behind a wrong one are judged"),
        ("if row == \"target\" and stage in", "if stage in", "a round is timed by the drafter's forwards")),
    *of("bench.py", "test_bench.py -k 'gaps or launchers'",
        ("environ.get(\"SLURM_ARRAY_TASK_MAX\", index) if", "index if", "some tasks of an array run"),
        ("if not of[1].endswith(\"/1\")), found[-1])", "if of[0]), found[-1])",
         "under srun each task of an array runs the whole data set")),
    *of("bench.py", "test_bench.py -k 'who_drafted or all_there'",
        ("own['right'] / own['judged']", "own['accepted'] / own['drafts']", "drafts behind a wrong one count as wrong"),
        ('of["ms"] - of["rounds"] * step) / step', 'of["ms"]) / step', "a draft is priced with its round's step"),
        ('fmt(n["ms"] / n["ids"], 2)', 'fmt(n["ms"] / n["rounds"], 2)', "ms an id is ms a round"),
        ('if options.kind == "tiny" or options.device.type == "cpu" or', 'if options.kind == "tiny" or',
         "on a CPU a copy is made that never pays")),
    *of("weights/drafting.py", "test_drafting.py -k leaves_a_drafter",
        ("if any(prices[G] < (1 + G) * step for G in lens) and self.trial(kind)", "if self.trial(kind)",
         "a drafter as slow as its target is tried again and again")),
    *of("weights/memory.py", "test_faults.py -k older", ("(where) < (8, 0)", "(where) < (7, 0)",
                                                         "a copy is made for a GPU that cannot multiply it")),
    *of("engine.py", "test_faults.py -k runs_without",
        ("if not all(bool(of.scales.isfinite().all()) for of in made.values() if isinstance(of, Packed)):", "if False:",
         "a copy whose scales are infinite drafts")),
    *of("weights/drafting.py", "test_self.py -k go_on_behind",
        ("if right >= self.ENOUGH or not", "if not", "the copy drafts what earlier answers hold"),
        ("ahead.ids[state.n_out:] + ahead.slots[:behind]", "ahead.ids[state.n_out:]",
         "what earlier answers hold behind a draft is not drafted")),
    *of("engine.py", "test_explain.py -k still_holds", ("if result is not model.answered:", "if False:",
                                                        "an answer is explained by the margins of another")),
    *of("engine.py", "test_request.py -k nobody_holds", ("            mine = self.lock.acquire(blocking=False)\n", "",
                                                         "a stream in a cycle keeps all others waiting")),
    *of("engine.py", "test_result.py",
        ("sum(at <= req.frames_at for", "sum(at <= req.prefill_end for",
         "window drafts are counted to the end of prefill"),
        ("sum(at <= req.prefill_end for", "sum(True for", "drafts made later count as made before the prefill ended"),
        ("result.ttft = at if result.ttft is None else result.ttft", "result.ttft = at",
         "the first id's time is the last one's"),
        ("result.ttfp = at if result.ttfp is None else result.ttfp", "result.ttfp = at",
         "the first preview's time is the last one's"),
        ("result.preview_end = req.preview[-1][1]", "result.preview_end = req.preview[0][1]",
         "the preview's end is its beginning"),
        ('check_finite(state, model, "draft")', "pass", "a drafter's NaN is drafted on its own device")),
    *of("engine.py", "test_request.py -k 'continuation or behind or stale or limit or any_drafts'",
        ("if end - begin <= 2 else most", "if end - begin <= 2 else 2", "a drafter left behind runs too few rows"),
        ("replayed()\n\n    def _resume", "pass\n\n    def _resume", "a drafter goes on from its own text")),
    *of("engine.py", "test_clip.py",
        ("pos_ids_S = self.state_W[PROMPT_LEN.value] - count_1 + at_S",
         "pos_ids_S = self.state_W[PROMPT_LEN.value] - count_1 + at_S + 1", "a question stands a row behind its place"),
        ("(count_1 - 1 - at_1).clamp(max=len(at_S) - 1)", "(count_1 - at_1).clamp(max=len(at_S) - 1)",
         "an answer begins behind the padding's first row"),
        ("agreeing(model.cached, prompt.after[:-1]) if req.goes_on else 0", "agreeing(model.cached, prompt.after[:-1])",
         "a question takes rows that an earlier one left"),
        ("(result.output_ids[:-1] if model is decider else [])", "(result.output_ids if model is decider else [])",
         "a chat takes the last id's row for written"),
        ("said = answer[:-1] if answer and answer[-1] in self.stops else answer", "said = answer",
         "a turn ends with two stop ids"),
        ("len(self.clips) >= room:\n                raise", "0 > room:\n                raise",
         "a request overwrites the rows of an open clip"),
        ("if earlier is not clip:", "if False:", "a question is asked of the clip that was asked before"),
        ("end = held + len(model.cached)", "end = held", "a clip that comes back has lost its chat's rows"),
        ("        self.cached = []\n        self.asked_W", "        self.asked_W",
         "a turn takes rows for written that a capture overwrote"),
        ("self.held, self.cached = held, model.cached\n", "self.held, self.cached = held, self.cached\n",
         "a clip that comes back runs its chat anew"),
        ("                engine.clips.discard(self)\n", "", "a clip that is closed keeps its place"),
        ("prompt_len=self.held + 1,", "prompt_len=1,", "a capture overwrites the rows of an open clip"),
        ("if n >= question), question)", "if n > question), question)", "a question of 32 rows waits for a capture"),
        ("cache[:, :, model.held:].zero_()", "pass", "NaN of one question reaches into the next"),
        ("kept, self.gate = self.gate, None", "kept = self.gate", "the gate learns from a black clip"),
        ("sorted({0, min(1, self.config.L - 1), ", "sorted({0, ", "a capture meets a kernel that was not warmed up"),
        ("            self.depths = kept\n", "            pass\n", "a warm-up leaves three layers for good"),
        ("if free - kept_free < whole / 8:", "if free < whole / 8:", "a capture runs out of memory that torch keeps"),
        ("(\"speculative\", longest)", "(\"speculative\", \"?\")",
         "the first question of more than 256 rows waits for cuBLAS")),
    *of("weights/drafting.py", "test_drafting.py",
        ("        if self.line:\n            self.line.commit(", "        if False:\n            self.line.commit(",
         "a drafter apart does not hear of rejected drafts")),
    *of("engine.py", "test_drafting.py",
        ("self.target.ring.set_line([])", "pass", "a request drafts what the last one expected"),
        ("if owner is not earlier:", "if False:", "a lookup finds another source's answers")),
    # what the report prints
    *of("weights/rows.py", "test_bench.py -k 'ratio or interval or acceptance or divide or later'",
        ('[base["e2e_ms"] / of["e2e_ms"] for base, of in pairs]',
         '[of["e2e_ms"] / base["e2e_ms"] for base, of in pairs]',
         "a ratio above 1 is slower"),
        ('{"p50": statistics.median(values), "low"', '{"p50": statistics.fmean(values), "low"', "p50 is the mean"),
        ("later = [ours - theirs for", "later = [theirs - ours for", "a later first id is printed as an earlier one"),
        ('"accept_rate": sum(accept_lens) / drafted', '"accept_rate": sum(accept_lens) / max(1, len(accept_lens))',
         "acceptance is over rounds and not over drafts"),
        ("statistics.mean(accept_lens) + 1 if", "statistics.mean(accept_lens) if", "a round's own id is not counted"),
        ("per_forward(ids - len(have), sum(taken))", "per_forward(ids, sum(taken))",
         "ids a forward counts the prefill's id and not its forward"),
        ("rounds + max(0, len(ids) - 1 - accepted - rounds)", "rounds + max(0, len(ids) - accepted - rounds)",
         "the prefill counts as a step"),
        ('if mode in row["modes"] and "target_only" in row["modes"]] if identical else []',
         'if mode in row["modes"] and "target_only" in row["modes"]]', "ratios are printed where answers differ")),
    *of("weights/rows.py", "test_bench.py -k 'further'",
        ("opened = [(open_ms, open_ms + ttft) for", "opened = [(open_ms, ttft) for",
         "a first question's time leaves out reading its clip"),
        ("for open_ms, ttft in asked if open_ms is None])", "for open_ms, ttft in asked])",
         "a clip's first question counts as a further one")),
    *of("bench.py", "test_bench.py -k 'summary'",
        ('/ (max(1, len(drafts)) if stage == "draft" else 1))', ")", "the time of several drafts is printed as one's"),
        ("per_request.pop((row, stage), None)", "pass", "a stage's sum counts beside its forwards")),
    *of("weights/rows.py", "test_bench.py -k 'differ or identical'",
        ('"equal": sum(of["identical"] for *_, of in found)', '"equal": len(found)',
         "answers that differ are called equal"),
        ("return None if ours == theirs else agreeing(ours, theirs)", "return None", "nothing ever differs")),
    *of("weights/controls.py", "test_controls.py test_bench.py -k 'control or interval'",
        ("if len(values) < 3:", "if len(values) < 1:", "an interval is printed for one sample"),
        ("found[int(0.025 * RESAMPLES)]", "found[int(0.25 * RESAMPLES)]", "half the interval is called 95 %"),
        ("last[len(ids):len(ids) + limit]", "last[len(ids) + 1:len(ids) + 1 + limit]",
         "the control is a place too late"),
        ("count(ways, answer, weight=-1)", "count(ways, answer, weight=0)",
         "a control has seen the answer it is asked for"),
        ("at += agreeing(propose(answer[:at], most)[:most], answer[at:]) + 1",
         "at += agreeing(propose(answer[:at], most)[:most], answer[at:]) + 2",
         "a control's round gives two ids of its own")),
]


# ---- the command -----------------------------------------------------------------------------------------------


def occurrences(entry: Break, root: Path = ROOT) -> int:
    """How often the text to be replaced occurs in its file; 0 without that file."""
    path = root / entry.file
    return path.read_text(encoding="utf-8").count(entry.old) if path.exists() else 0


def copy_of(root: Path, folder: Path) -> Path:
    """The tree in `folder`, beside a link to what lies beside the tree."""
    tree = folder / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    shared = root.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return tree


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """(exit code of pytest, the end of what it printed): 0 passed, 1 failed."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    try:
        done = subprocess.run(command, cwd=tree / "tests", env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 1, "took too long"                            # a break may also show as a hang
    return done.returncode, done.stdout[-2000:] + done.stderr[-500:]


def verdict(entry: Break, tree: Path) -> tuple[str, str]:
    """("caught", "UNCAUGHT" or "NO TEST", the end of what pytest printed) of one break in a copy of the tree."""
    path = tree / entry.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(entry.old, entry.new), encoding="utf-8")
    try:
        code, printed = run_tests(tree, entry.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return {0: "UNCAUGHT", 1: "caught"}.get(code, "NO TEST"), printed      # else: nothing collected, a wrong name, ..


def run(breaks, workers: int = 1, root: Path = ROOT, show=print) -> int:
    """Tries all of them; returns how many are not as they should be."""
    stale = [entry for entry in breaks if occurrences(entry, root) != 1]
    for entry in stale:
        show(f"OUT OF DATE  {entry.file}: {occurrences(entry, root)} times {entry.old!r}")
    fresh, wrong, trees = [entry for entry in breaks if entry not in stale], len(stale), queue.Queue()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        for i in range(workers):
            trees.put(copy_of(root, Path(name) / str(i)))

        def within(work, *args):
            tree = trees.get()
            try:
                return work(*args, tree)
            finally:
                trees.put(tree)
        selections = list(dict.fromkeys(entry.tests for entry in fresh))
        sound = pool.map(lambda tests: within(lambda tests, tree: run_tests(tree, tests), tests), selections)
        broken = {tests: printed for tests, (code, printed) in zip(selections, sound, strict=True) if code}
        for tests, printed in broken.items():
            show(f"FAILS UNBROKEN  {tests}\n{printed}")
        fresh = [entry for entry in fresh if entry.tests not in broken]

        def tried(entry):
            began = time.monotonic()
            return *within(verdict, entry), time.monotonic() - began
        for entry, (word, printed, seconds) in zip(fresh, pool.map(tried, fresh), strict=True):
            show(f"{word:9} {seconds:6.1f} s  {entry.file}: {entry.why}"
                 + ("" if word == "caught" else f"\n    {entry.old!r}\n    by {entry.tests}")
                 + (f"\n{printed}" if word == "NO TEST" else ""))
            wrong += word != "caught"
    show(f"{len(breaks)} breaks: {len(breaks) - wrong - sum(b.tests in broken for b in breaks)} caught, {wrong} not, "
         f"{len(broken)} test selections that fail without any")
    return wrong + len(broken)


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", metavar="WORDS", default="", help="breaks whose line holds all of these words")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="breaks at a time (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    options = parser.parse_args(argv)
    if options.n < 1:
        parser.error(f"-n: wanted 1 or more, got {options.n}")
    chosen = [entry for entry in BREAKS if all(word in f"{entry.file} {entry.why} {entry.tests}"
                                               for word in options.only.split())]
    if not chosen:
        parser.error(f"--only: no break holds {options.only!r}")
    if options.list:
        print("\n".join(f"{entry.file}: {entry.why} ({entry.tests})" for entry in chosen))
        return 0
    return int(run(chosen, options.n, show=lambda line: print(line, flush=True)) > 0)


if __name__ == "__main__":
    sys.exit(main())
