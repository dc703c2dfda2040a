"""What the published checkpoints' small files say, key by key: read, computed as it is and no other way, or without
effect on an answer. A key of theirs that is in no table here fails the test.

Sources: config.json, generation_config.json and preprocessor_config.json of LanguageBind/Video-LLaVA-7B-hf, and as
transformers 5 writes them; config.json of EventGPT-7b and of openai/clip-vit-large-patch14-336; Vicuna's
generation_config.json."""

import json

import pytest

from weights import InputError
from weights.load import clip_folder, insist_ids, insist_processor, read_config, stop_ids
from weights.names import extra_rows, plan
from weights.shapes import VisionConfig, frames_of, text_config

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu", "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "attention_bias": False,
         "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1,
         "use_cache": True, "torch_dtype": "float16", "_name_or_path": "lmsys/vicuna-7b-v1.5", "sliding_window": None}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14, "image_size": 224, "projection_dim": 768, "vocab_size": 32000,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3, "attention_dropout": 0.0,
        "dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02, "torch_dtype": "float32"}
PROCESSOR = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
             "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073], "do_convert_rgb": True,
             "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 224},
             "crop_size": {"height": 224, "width": 224}, "image_processor_type": "VideoLlavaImageProcessor",
             "processor_class": "VideoLlavaProcessor", "feature_extractor_type": "CLIPFeatureExtractor"}
TARGET = {
    "architectures": ["VideoLlavaForConditionalGeneration"], "model_type": "video_llava", "ignore_index": -100,
    "image_token_index": 32000, "video_token_index": 32001, "pad_token_id": 32002, "projector_hidden_act": "gelu",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    "torch_dtype": "bfloat16", "dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "image_seq_length": 256,
    "video_seq_length": 2056, "multimodal_projector_bias": True, "tie_word_embeddings": False,
    "text_config": {**LLAMA, "model_type": "llama", "vocab_size": 32064,
                    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, "vision_config": CLIP}
DRAFTER = {**LLAMA, "architectures": ["EventChatModel"], "model_type": "EventChat_llama", "mm_visual_tower": "clip",
           "event_feature_adaptor": True, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
           "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "image_aspect_ratio": "square",
           "tune_mm_mlp_adapter": False, "use_feature_adaptor": True, "stage3": True, "mm_projector_lr": None,
           "use_event_qformer": False}
FILES = {     # file -> what it holds
    "target/config.json": TARGET, "target/preprocessor_config.json": PROCESSOR,
    "target/generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32002,
                                      "_from_model_config": True, "transformers_version": "4.39.0.dev0"},
    "drafter/config.json": DRAFTER, "drafter/clip/config.json": {**CLIP, "image_size": 336},
    "drafter/clip/preprocessor_config.json": {**PROCESSOR, "size": 336, "crop_size": 336},
    "drafter/generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096,
                                       "temperature": 0.9, "top_p": 0.6, "do_sample": True}}
READ = {      # key -> another value, which gives another model, another limit or another end
    "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32100, "max_position_embeddings": 8, "rms_norm_eps": 1e-6,
    "bos_token_id": 5, "eos_token_id": [7, 2], "tie_word_embeddings": True, "rope_theta": 5e5, "patch_size": 28,
    "layer_norm_eps": 1e-6, "vision_feature_layer": [-1], "vision_feature_select_strategy": "full",
    "video_seq_length": 257, "event_feature_adaptor": False, "mm_use_im_patch_token": True,
    "mm_visual_tower": "elsewhere"}
ONLY = {      # key -> another value, which is refused by the key's name
    "model_type": "qwen2", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "sliding_window": 4096,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_type": "yarn", "num_channels": 4,
    "use_event_qformer": True, "projector_hidden_act": "relu", "multimodal_projector_bias": False,
    "mm_use_im_start_end": True, "do_resize": False, "do_center_crop": False, "do_rescale": False,
    "do_normalize": False, "resample": 2, "rescale_factor": 1.0, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"shortest_edge": 100}, "crop_size": 100, "image_size": 448}
NOTHING = {   # key -> why it changes no answer
    "architectures": "model_type says it", "_name_or_path": "a remark", "transformers_version": "a remark",
    "_from_model_config": "a remark", "image_processor_type": "a remark", "processor_class": "a remark",
    "feature_extractor_type": "a remark", "torch_dtype": "load_engine's dtype", "dtype": "load_engine's dtype",
    "attention_dropout": "of training", "dropout": "of training", "initializer_range": "of training",
    "initializer_factor": "of training", "ignore_index": "of training", "mm_projector_lr": "of training",
    "tune_mm_mlp_adapter": "of training", "stage3": "of training", "use_feature_adaptor": "of training",
    "pretraining_tp": "the same product in parts", "use_cache": "always", "pad_token_id": "batch one has no padding",
    "image_token_index": "rows are spliced in where the prompt's text says", "video_token_index": "the same",
    "image_seq_length": "a picture's rows follow from its tower", "projection_dim": "of CLIP's text side",
    "tokenizer_model_max_length": "of training", "tokenizer_padding_side": "batch one", "image_aspect_ratio": "square",
    "do_convert_rgb": "always", "max_length": "max_new_tokens", "temperature": "an argument", "top_p": "an argument",
    "do_sample": "temperature"}
ELSEWHERE = {  # (file, section) -> keys that have another verdict there
    ("target/config.json", ""): {"vocab_size": "the text section's is read"},
    ("target/config.json", "vision_config"): {"vocab_size": "of CLIP's text side"},
    ("drafter/clip/config.json", ""): {"vocab_size": "of CLIP's text side"},
    ("target/generation_config.json", ""): {"bos_token_id": "the config's is read"},
    ("drafter/generation_config.json", ""): {"bos_token_id": "the config's is read"},
    ("target/config.json", "text_config"): {"eos_token_id": "generation_config.json goes before it"},
    ("drafter/config.json", ""): {"eos_token_id": "generation_config.json goes before it"}}
SECTIONS = [*((file, "") for file in FILES), *(("target/config.json", section) for section in
                                               ("text_config", "vision_config", "text_config/rope_parameters"))]


def section_of(content: dict, section: str) -> dict:
    for name in filter(None, section.split("/")):
        content = content[name]
    return content


def reading(folder, side: str) -> tuple:
    """All that the engine takes from a side's small files."""
    place = folder / side
    config = read_config(place)
    found = plan(config, place / "config.json")
    insist_ids(place, config)
    insist_processor(clip_folder(place, config) if side == "drafter" else place, config)
    vision = VisionConfig.read(config["vision_config"])
    names = ("vision_feature_layer", "vision_feature_select_strategy", "mm_visual_tower", "mm_use_im_start_end")
    return (found, text_config(config), vision, stop_ids(place, config), frames_of(config, vision), extra_rows(config),
            *(config.get(name) for name in names))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for file, content in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    return folder, {side: reading(folder, side) for side in ("target", "drafter")}


@pytest.mark.parametrize("file, section", SECTIONS)
def test_every_key_of_the_published_files_is_read_or_refused_or_known_to_change_nothing(published, file, section):
    folder, sound = published
    side, keys = file.split("/")[0], section_of(FILES[file], section)
    for key in keys:
        if isinstance(keys[key], dict) and (file, f"{section}/{key}".strip("/")) in SECTIONS:
            continue                                         # a section, whose own keys are gone through
        content = json.loads(json.dumps(FILES[file]))
        idle = ELSEWHERE.get((file, section), {}).get(key) or NOTHING.get(key)
        section_of(content, section)[key] = {"changed": 1} if idle else READ.get(key, ONLY.get(key))
        if key == "rope_theta" and side == "target":         # which has two homes there
            content["text_config"].pop("rope_parameters" if section == "text_config" else key)
        if key in ("patch_size", "image_size") and side == "target":     # of which a frame's rows follow
            del content["video_seq_length"]
        (folder / file).write_text(json.dumps(content))
        try:
            if idle:
                assert reading(folder, side) == sound[side], f"{key}: changes something"
            elif key in READ:
                assert reading(folder, side) != sound[side], f"{key}: is not read"
            else:
                assert key in ONLY, f"{key}: nothing is known of it"
                with pytest.raises(InputError) as error:
                    reading(folder, side)
                assert key.replace("rope_scaling", "rope scaling").replace("image_size", "size") in str(error.value)
        finally:
            (folder / file).write_text(json.dumps(FILES[file]))


def test_a_file_that_is_not_there_means_what_the_published_one_says(published, tmp_path):
    """config.json says little on the hub: what it leaves out is what the tables above hold."""
    sound = published[1]
    keep = ("model_type", "mm_visual_tower", "event_feature_adaptor", "mm_use_im_patch_token")
    for file, content in {
            "target/config.json": {"model_type": "video_llava", "text_config": {"vocab_size": 32064},
                                   "vision_config": {}},
            "drafter/config.json": {key: DRAFTER[key] for key in keep},
            "drafter/clip/config.json": {"image_size": 336}}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    for side in sound:
        assert reading(tmp_path, side)[:5] == sound[side][:5]
