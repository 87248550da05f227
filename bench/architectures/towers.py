"""Model types of transformers that are mostly halves of others: their towers, encoders, decoders.

Each is a class of a model type that has no other place in the zoo, and is trained on what it takes:
tokens, images, sounds or what another model has computed. Settings other than sizes are given only
where a small model needs them.
"""

from typing import Any

import torch
from torch import Tensor

from bench.architectures import data
from bench.architectures.case import Architecture, total
from bench.architectures.tiny import Batch, architecture

_TOKENS = {
    "aimv2_text_model": "Aimv2TextModel",
    "align_text_model": "AlignTextModel",
    "altclip_text_model": "AltRobertaModel",
    "bert-generation": "BertGenerationDecoder",
    "blip_text_model": "BlipTextLMHeadModel",
    "blt_patcher": "BltPatcher",
    "bridgetower_text_model": "BridgeTowerTextModel",
    "camembert": "CamembertForCausalLM",
    "canary_decoder": "CanaryDecoder",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "clap_text_model": "ClapTextModel",
    "clip_text_model": "CLIPTextModel",
    "clipseg_text_model": "CLIPSegTextModel",
    "clvp_decoder": "ClvpDecoder",
    "csm_depth_decoder_model": "CsmDepthDecoderModel",
    "dia_encoder": "DiaEncoder",
    "dpr": "DPRQuestionEncoder",
    "embedding_gemma2": "EmbeddingGemma2Model",
    "embedding_gemma2_text": "EmbeddingGemma2TextModel",
    "emu3_text_model": "Emu3TextModel",
    "flava_text_model": "FlavaTextModel",
    "fuyu": "FuyuForCausalLM",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "gpt-sw3": "GPT2LMHeadModel",
    "granite4_vision_text": "Granite4VisionTextModel",
    "granite_docling_text": "GraniteDoclingTextModel",
    "groupvit_text_model": "GroupViTTextTransformer",
    "higgs_audio_v2": "HiggsAudioV2ForConditionalGeneration",
    "inkling2": "Inkling2ForConditionalGeneration",
    "inkling_mm_model": "InklingForConditionalGeneration",
    "instructblip_qformer": "InstructBlipQFormerModel",
    "instructblipvideo_qformer": "InstructBlipVideoQFormerModel",
    "internlm3": "LlamaForCausalLM",
    "iquestcoder": "LlamaForCausalLM",
    "kosmos-2.5": "Kosmos2_5ForConditionalGeneration",
    "kosmos_2_5_text_model": "Kosmos2_5TextTransformer",
    "kosmos_2_text_model": "Kosmos2TextTransformer",
    "lighton_ocr": "LightOnOcrForConditionalGeneration",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "mllama": "MllamaForCausalLM",
    "mllama_text_model": "MllamaTextModel",
    "molmo2_text": "Molmo2TextModel",
    "moshi": "MoshiForCausalLM",
    "muse_glimmer_text": "MuseGlimmerTextModel",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "owlv2_text_model": "Owlv2TextTransformer",
    "owlvit_text_model": "OwlViTTextTransformer",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextModel",
    "qwen3_vl_text": "Qwen3VLTextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "siglip_text_model": "SiglipTextModel",
    "tipsv2_text_model": "Tipsv2TextModel",
    "trocr": "TrOCRForCausalLM",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
    "videoprism_text_model": "VideoPrismTextModel",
    "xclip_text_model": "XCLIPTextModel",
}
_IMAGES = {
    "aimv2_vision_model": "Aimv2VisionModel",
    "altclip_vision_model": "AltCLIPVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
    "blip_vision_model": "BlipVisionModel",
    "chinese_clip_vision_model": "ChineseCLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "clipseg_vision_model": "CLIPSegVisionModel",
    "flava_image_model": "FlavaImageModel",
    "git_vision_model": "GitVisionModel",
    "groupvit_vision_model": "GroupViTVisionModel",
    "instructblip_vision_model": "InstructBlipVisionModel",
    "instructblipvideo_vision_model": "InstructBlipVideoVisionModel",
    "internvl_vision": "InternVLVisionModel",
    "janus_vision_model": "JanusVisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "mlcd": "MLCDVisionModel",
    "mlcd_vision_model": "MLCDVisionModel",
    "phi4_multimodal_vision": "Phi4MultimodalVisionModel",
    "pixio": "PixioModel",
    "pixtral": "PixtralVisionModel",
    "pp_lcnet_v4": "PPLCNetV4Backbone",
    "qianfan_ocr_vision": "QianfanOCRVisionModel",
    "rf_detr_dinov2": "RfDetrDinov2Backbone",
    "sam3_vision_model": "Sam3VisionModel",
    "sam3_vit_model": "Sam3ViTModel",
    "sam_hq_vision_model": "SamHQVisionModel",
    "sam_vision_model": "SamVisionModel",
    "sapiens2": "Sapiens2Model",
    "siglip_vision_model": "SiglipVisionModel",
    "slanext": "SLANeXtForTableRecognition",
    "slanext_vision": "SLANeXtVisionEncoder",
    "tipsv2_vision_model": "Tipsv2VisionModel",
    "vitdet": "VitDetModel",
}
_EMBEDDED = {
    "blt_global_transformer": "BltGlobalTransformer",
    "csm": "CsmBackboneModel",
    "kyutai_speech_to_text": "KyutaiSpeechToTextModel",
    "musicgen_decoder": "MusicgenDecoder",
    "musicgen_melody_decoder": "MusicgenMelodyDecoder",
    "nemotron3_5_transcribe_word_timestamp": "Nemotron3_5TranscribeWordTimestampModel",
    "pp_formulanet_text": "PPFormulaNetTextModel",
}
_HIDDEN = {
    "flava_multimodal_model": "FlavaMultimodalModel",
    "speecht5": "SpeechT5Encoder",
}
_FRAMES = {
    "glmasr_encoder": "GlmAsrEncoder",
    "voxtral_realtime_encoder": "VoxtralRealtimeEncoder",
}
_PIXELS = {
    "got_ocr2_vision": "GotOcr2VisionEncoder",
    "granite_docling_vision": "GraniteDoclingVisionModel",
    "idefics2_vision": "Idefics2VisionTransformer",
    "idefics3_vision": "Idefics3VisionTransformer",
    "kosmos_2_vision_model": "Kosmos2VisionTransformer",
    "ovis2_vision": "Ovis2VisionModel",
    "owlv2_vision_model": "Owlv2VisionTransformer",
    "owlvit_vision_model": "OwlViTVisionTransformer",
    "smolvlm_vision": "SmolVLMVisionTransformer",
    "step3p5_vision": "Step3p7VisionModel",
}
_SPECTRA = {
    "lasr_encoder": "LasrEncoder",
    "nemotron3_5_transcribe_asr_audio": "Nemotron3_5TranscribeAsrAudioModel",
    "nemotron3_diarization_audio": "Nemotron3DiarizationAudioModel",
    "nemotron_asr_streaming_encoder": "NemotronAsrStreamingEncoder",
    "parakeet_encoder": "ParakeetEncoder",
}
_WAVES = {
    "moonshine_streaming_encoder": "MoonshineStreamingEncoder",
}
_LARGE = {
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecModel",
    "pp_ocrv6_tiny_rec": "PPOCRV6TinyRecModel",
}
_SERIES = {
    "timesfm2_5": "TimesFm2_5Model",
}
_SOUNDS = {
    "pocket_tts_audio_tokenizer_encoder": "PocketTTSAudioTokenizerEncoderModel",
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {
    **_HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ROTATED = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
_UNSHARED = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96}
_SET: dict[str, tuple[str, dict[str, Any]]] = {
    "audioflamingo3": ("AudioFlamingo3ForConditionalGeneration", {}),
    "axk2": ("AXK2ForCausalLM", {"num_key_value_heads": 4}),
    "bailing_hybrid": ("BailingHybridForCausalLM", {**_HYBRID, "num_key_value_heads": 4}),
    "clvp_encoder": ("ClvpEncoder", {"use_rotary_embedding": False}),
    "colmodernvbert": ("ColModernVBertForRetrieval", {}),
    "dots1": (
        "Dots1ForCausalLM",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_k": 2}),
    "gemma3n_text": ("Gemma3nForCausalLM", _UNSHARED),
    "gemma4_text": ("Gemma4ForCausalLM", _UNSHARED),
    "glm4v_moe_text": ("Glm4vMoeTextModel", _ROTATED),
    "glm4v_text": ("Glm4vTextModel", _ROTATED),
    "glm_image_text": ("GlmImageTextModel", _ROTATED),
    "glm_ocr_text": ("GlmOcrTextModel", _ROTATED),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
    ),
    "jamba": ("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "kimi_linear": ("KimiLinearForCausalLM", {**_HYBRID, "num_key_value_heads": 4}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    ),
    "pix2struct_text_model": ("Pix2StructTextModel", {"initializer_range": 0.02}),
    "qwen2_5_omni_text": ("Qwen2_5OmniThinkerTextModel", _ROTATED),
    "qwen2_5_vl_text": ("Qwen2_5_VLTextModel", _ROTATED),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", {}),
    "qwen2_vl_text": ("Qwen2VLTextModel", _ROTATED),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", _LINEAR),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _LINEAR),
    "qwen3_next": ("Qwen3NextForCausalLM", _LINEAR),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"block_types": ["recurrent", "attention"]}),
    "step3p5": ("Step3p7TextModel", {"sliding_window": 4}),
    "video_llava": ("VideoLlavaForConditionalGeneration", {}),
    "voxtral": ("VoxtralForConditionalGeneration", {}),
}


_TEXT_ALONE = {
    "EvollaModel": "EvollaModel",
    "colpali": "ColPaliForRetrieval",
    "cosmos3_omni": "Cosmos3OmniForConditionalGeneration",
    "evolla": "EvollaForProteinText2Text",
    "exaone4_5": "Exaone4_5_ForConditionalGeneration",
    "glmasr": "GlmAsrForConditionalGeneration",
    "granite_docling": "GraniteDoclingForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "granite_speech_plus": "GraniteSpeechPlusForConditionalGeneration",
    "hyperclovax_vision_v2": "HyperCLOVAXVisionV2ForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "modernvbert": "ModernVBertForMaskedLM",
    "moss_transcribe_diarize": "MossTranscribeDiarizeForConditionalGeneration",
    "muse_glimmer": "MuseGlimmerForConditionalGeneration",
    "musicflamingo": "MusicFlamingoForConditionalGeneration",
    "pp_chart2table": "GotOcr2ForConditionalGeneration",
    "qianfan_ocr": "QianfanOCRForConditionalGeneration",
    "shieldgemma2": "Gemma3ForConditionalGeneration",
    "ultravbert": "UltraVBertForMaskedLM",
    "video_llama_3": "VideoLlama3ForConditionalGeneration",
}
"""Models of texts with images, sounds or proteins, trained on texts."""


def _films(step: int) -> dict[str, Any]:
    return {"pixel_values_videos": data.noise(step, 4, 3, 32, 32)}


def _prompted(step: int) -> dict[str, Any]:
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: data.noise(step + i, 3, 32, 32) for i, name in enumerate(names)}


def _patches(step: int) -> dict[str, Any]:
    return {
        "pixel_values": data.noise(step, 16, 192),
        "pixel_attention_mask": torch.ones(data.SIZE, 16, dtype=torch.int64),
        "spatial_shapes": torch.full((data.SIZE, 2), 4),
    }


def _matched(output: Any) -> Tensor:
    """Of what is compared; the hidden states are views, of which docs/limits.md speaks."""
    return output.logits_per_video.square().mean()


_SEEN: dict[str, tuple[str, dict[str, Any], Batch]] = {
    "seggpt": ("SegGptModel", {"image_size": [64, 32], "pretrain_image_size": 32}, _prompted),
    "siglip2_vision_model": ("Siglip2VisionModel", {}, _patches),
    "videoprism": (
        "VideoPrismClipModel",
        {"vision_config": {"num_frames": 4}},
        lambda step: {**_films(step), "input_ids": data.ids(step)},
    ),
    "videoprism_vision_model": ("VideoPrismVisionModel", {"num_frames": 4}, _films),
}
_GIVEN: list[tuple[str, dict[str, str], Batch]] = [
    ("text tower", _TOKENS, data.tokens),
    ("text tower", _TEXT_ALONE, data.tokens),
    ("image tower", _IMAGES, data.images),
    ("image tower", _PIXELS, lambda step: {"pixel_values": data.noise(step, 3, 32, 32)}),
    ("image tower", _LARGE, lambda step: {"pixel_values": data.noise(step, 3, 64, 64)}),
    ("text tower", _EMBEDDED, lambda step: {"inputs_embeds": data.noise(step, 16, 32)}),
    ("text tower", _HIDDEN, lambda step: {"hidden_states": data.noise(step, 16, 32)}),
    ("sound tower", _SPECTRA, lambda step: {"input_features": data.noise(step, 32, 16)}),
    ("sound tower", _FRAMES, lambda step: {"input_features": data.noise(step, 16, 64)}),
    ("sound tower", _WAVES, lambda step: {"input_values": data.noise(step, 800)}),
    ("sound tower", _SOUNDS, lambda step: {"input_values": data.noise(step, 1, 640)}),
    ("time series", _SERIES, lambda step: {"past_values": data.noise(step, 32)}),
]


def all_of() -> list[Architecture]:
    """The towers."""
    found = [
        architecture(model_type, family, model_class, batch, {})
        for family, table, batch in _GIVEN
        for model_type, model_class in table.items()
    ]
    for model_type, (model_class, settings) in _SET.items():
        found.append(architecture(model_type, "text tower", model_class, data.tokens, settings))
    for model_type, (model_class, settings, batch) in _SEEN.items():
        loss = _matched if model_type == "videoprism" else total
        found.append(
            architecture(model_type, "image tower", model_class, batch, settings, loss=loss)
        )
    return found
