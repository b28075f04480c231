"""SDXL's architecture in small: the same classes and files, other numbers.

The text encoders keep CLIP's vocabulary, so their embedding tables are the largest part of
the checkpoint; everything else is as thin as follows its prompt.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imaged.prompt.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).resolve().parents[2] / "imaged" / "checkpoints" / "micro"
TEXT_WIDTH = 32
POOLED_WIDTH = 64
TIME_IDS_WIDTH = 32
EOS = 49407  # "<|endoftext|>" in CLIP's vocabulary


def build_vae() -> AutoencoderKL:
    """8x autoencoder with four latent channels; no attention in the middle (large pictures)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # wide groups: narrow ones forget the colour of a flat area
        sample_size=512,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Four levels: at 512 px the deepest sees the whole picture as 8 x 8."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=(
            "DownBlock2D",
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 96, 96),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 3, 3),
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * TIME_IDS_WIDTH,
    )


def _text_config(**extra: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,  # the penultimate layer is the context, as in SDXL
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=POOLED_WIDTH,
        bos_token_id=EOS - 1,
        eos_token_id=EOS,
        **extra,
    )


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The context of each is (batch, 77, 32); the second also gives pooled (batch, 64)."""
    first = CLIPTextModel(_text_config(hidden_act="quick_gelu", pad_token_id=EOS))
    second = CLIPTextModelWithProjection(_text_config(hidden_act="gelu", pad_token_id=0))
    return first, second


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own scheduler config."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def load_tokenizer(name: str = "tokenizer") -> Tokenizer:
    """A shipped tokenizer; the second encoder's, "tokenizer_2", differs in its padding only."""
    return Tokenizer(CHECKPOINT / name)
