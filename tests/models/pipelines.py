"""Small pipelines of diffusers with random weights, saved as folders."""

from __future__ import annotations

import functools
import math
import types
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

WORDS = ["<pad>", "<eos>", "<unk>", *"a an red green blue heart apple circle cat dog the of lighthouse at dawn".split()]
VOCABULARY = 24


CHAT = "{% for m in messages %}of {{ m.content if m.content is string else m.content[0].text }} the {% endfor %}"


def tokenizer(length: int = 8) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
        chat_template=CHAT,
    )


def clip(projection: bool = False, width: int = 8, length: int = 8) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, eos_token_id=1, pad_token_id=0, bos_token_id=2, projection_dim=width,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int = 8) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, tie_word_embeddings=False
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def umt5(width: int = 8) -> Any:
    config = transformers.UMT5Config(vocab_size=VOCABULARY, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.UMT5EncoderModel(config)


def gemma(width: int = 8) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def bert(width: int = 8) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=80,
    )  # fmt: skip
    return transformers.BertModel(config)


def glm(width: int = 8) -> Any:
    config = transformers.GlmConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GlmModel(config)


def qwen(kind: str = "Qwen3Model", layers: int = 2, width: int = 8) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        head_dim=4, num_key_value_heads=1,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def llama(width: int = 8) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def qwen_vl(width: int = 8) -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]},
        },
        vision_config={"depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": width, "intermediate_size": 8},
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def autoencoder(channels: int = 4, levels: int = 2, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(4,) * levels, layers_per_block=1,
        norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        **more,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True), tokenizer_2=tokenizer(),
        text_encoder_3=t5(16), tokenizer_3=tokenizer(),
    )  # fmt: skip


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **more,
    )  # fmt: skip


def sd(**scheduler: Any) -> Any:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **scheduler}
    return diffusers.StableDiffusionPipeline(
        unet=unet(cross_attention_dim=8), scheduler=diffusers.DDIMScheduler(clip_sample=False, **settings), vae=autoencoder(),
        text_encoder=clip(), tokenizer=tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(cross_attention_dim=16, **added),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        vae=autoencoder(scaling_factor=0.13), text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=tokenizer(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def flux(guidance: bool = True) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4), text_encoder=clip(), tokenizer=tokenizer(),
        text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


def sana() -> Any:
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.41407,
        ),
        text_encoder=gemma(), tokenizer=tokenizer(300),
    )  # fmt: skip


def wan() -> Any:
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8,
            freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=umt5(), tokenizer=tokenizer(512),
    )  # fmt: skip


if not diffusers.utils.is_ftfy_available():  # which this pipeline calls nevertheless
    pipeline_skyreels_v2.ftfy = types.SimpleNamespace(fix_text=str)


def skyreels() -> Any:
    return diffusers.SkyReelsV2Pipeline(
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8,
            freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=umt5(), tokenizer=tokenizer(512),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
    )  # fmt: skip


def pixart(alpha: bool = True) -> Any:
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    return kind(
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, num_layers=1, cross_attention_dim=24,
            caption_channels=8, sample_size=128, use_additional_conditions=None if alpha else False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02), vae=autoencoder(scaling_factor=0.2),
        text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            num_embeds_ada_norm=1000,
        ),
        scheduler=diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False), vae=autoencoder(),
    )  # fmt: skip


def ddpm(**more: Any) -> Any:
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **more,
        ),
        scheduler=diffusers.DDPMScheduler(clip_sample=False),
    )  # fmt: skip


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 8, 8), cap_feat_dim=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(levels=4, shift_factor=0.1, scaling_factor=0.4), text_encoder=gemma(), tokenizer=tokenizer(),
    )  # fmt: skip


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pos_embed_max_size=64,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73), vae=autoencoder(scaling_factor=0.13),
        text_encoder=umt5(), tokenizer=tokenizer(),
    )  # fmt: skip


def hunyuandit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=4, hidden_size=16,
            num_layers=4, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction", clip_sample=False
        ),
        vae=autoencoder(levels=4, scaling_factor=0.13), text_encoder=bert(), tokenizer=tokenizer(), text_encoder_2=t5(),
        tokenizer_2=tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=8,
            time_embed_dim=16, condition_dim=8, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
        vae=autoencoder(), text_encoder=glm(), tokenizer=tokenizer(),
    )  # fmt: skip


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 2.0, 0.7, 1.1],
        ),
        text_encoder=qwen_vl(), tokenizer=tokenizer(),
    )  # fmt: skip


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 2, 2],
            axes_lens=[600, 32, 32],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=qwen(), tokenizer=tokenizer(),
    )  # fmt: skip


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4), text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def flux2(klein: bool = False) -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return (diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline)(
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=not klein,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=qwen("Qwen3ForCausalLM", 28 if klein else 31), tokenizer=tokenizer(),
    )  # fmt: skip


def ltx() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4), scaling_factor=0.8,
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), timestep_conditioning=True,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-1, 1, 4))
    vae.latents_std.copy_(torch.linspace(0.5, 2, 4))
    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
            caption_channels=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=t5(),
        tokenizer=tokenizer(),
    )  # fmt: skip


def cogvideox(**more: Any) -> Any:
    blocks = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    return diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
            num_layers=1, sample_width=6, sample_height=4, sample_frames=9, use_rotary_positional_embeddings=True, **more,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
        ),
        vae=diffusers.AutoencoderKLCogVideoX(latent_channels=4, scaling_factor=0.7, **blocks), text_encoder=t5(),
        tokenizer=tokenizer(),
    )  # fmt: skip


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        text_encoder=llama(), tokenizer=tokenizer(), text_encoder_2=clip(length=77), tokenizer_2=tokenizer(),
    )  # fmt: skip


class CosineDPMSolverMultistepScheduler(diffusers.EDMDPMSolverMultistepScheduler):
    """What that of diffusers tells a denoiser; without torchsde it has none itself."""

    __module__ = "diffusers"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{
            "sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "prediction_type": "v_prediction",
            "sigma_schedule": "exponential", **settings,
        })  # fmt: skip

    def precondition_noise(self, sigma: Any) -> torch.Tensor:
        return torch.as_tensor(sigma).atan() / math.pi * 2


if not diffusers.utils.is_torchsde_available():
    diffusers.CosineDPMSolverMultistepScheduler = CosineDPMSolverMultistepScheduler


def stable_audio() -> Any:
    return diffusers.StableAudioPipeline(
        transformer=diffusers.StableAudioDiTModel(
            sample_size=16, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            num_key_value_attention_heads=1, cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(),
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=4, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=4,
            decoder_input_channels=4, sampling_rate=8,
        ),
        text_encoder=t5(), tokenizer=tokenizer(),
        projection_model=StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=512),
    )  # fmt: skip


PIPELINES = {
    "sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "sana": sana, "wan": wan, "pixart": pixart,
    "pixart-sigma": functools.partial(pixart, alpha=False), "dit": dit, "ddpm": ddpm,
    "lumina2": lumina2, "auraflow": auraflow, "hunyuandit": hunyuandit, "cogview4": cogview4,
    "qwen-image": qwen_image, "z-image": z_image, "chroma": chroma, "flux2": flux2,
    "flux2-klein": functools.partial(flux2, klein=True), "ltx": ltx, "cogvideox": cogvideox,
    "cogvideox-1.5": functools.partial(cogvideox, patch_size_t=2, patch_bias=False), "hunyuan-video": hunyuan_video,
    "stable-audio": stable_audio, "skyreels": skyreels,
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Write the pipeline of this name, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for weight in part.parameters():  # what starts without effect has some
                    if not bool(weight.any()):
                        torch.nn.init.normal_(weight, std=0.05)
    pipeline.save_pretrained(folder)
    return folder
