"""The AudioNTT encoder of sound.

Letters: B samples, C channels, M mel bands, T frames, D width, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.errors import UserError


class AudioNTT(nn.Module):
    """Three halving blocks, then a two-layer perceptron on each frame: spectrogram [B,1,M,T] to logits [B,K].

    A block is a 3x3 convolution, BatchNorm, ReLU and 2x2 max pooling. Of 64 bands and 64 channels, `blocks.0`,
    `blocks.1` and `blocks.2` have 2048, 1024 and 512 numbers a frame (`pooled` gives their mean over time), and `fc`
    gives the final sequence [B,T/8,width] with max + mean over time as its embedding. The classifier `head` reads the
    mean over time alone, as the official downstream code does. Takes any number of frames from 8.

    Args:
        num_classes: K, classes of `head`.
        n_mels: M, at least 8.
        channels: of every block; 64 in the papers.
        width: D, of the two layers; 2048 in the papers.
        dropout: between the two layers.

    Source: BYOL-A (Niizumi et al. 2021); LAPE, `src/encoder/audiontt.py` and `src/downstream/downstream_encoder.py`.
    """

    def __init__(
        self, num_classes: int = 10, n_mels: int = 64, channels: int = 64, width: int = 2048, dropout: float = 0.3
    ) -> None:
        super().__init__()
        if n_mels < 8:
            raise UserError(f"audio_ntt halves the mel bands three times and needs at least 8, got {n_mels}.")
        shape = {"n_mels": n_mels, "channels": channels, "width": width, "dropout": dropout}
        self.origin = {"name": "audio_ntt", "num_classes": num_classes, "config": shape}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
            )
            for before in (1, channels, channels)
        )
        self.fc = nn.Sequential(
            nn.Linear(channels * (n_mels // 8), width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, num_classes)

    def sequence(self, spectrogram_B1MT: Tensor) -> Tensor:
        """The final sequence [B,T/8,D]. Raises `UserError` for clips of fewer than 8 frames."""
        if spectrogram_B1MT.shape[-1] < 8:
            raise UserError(f"audio_ntt needs clips of at least 8 frames, got {spectrogram_B1MT.shape[-1]}.")
        out = spectrogram_B1MT
        for block in self.blocks:
            out = block(out)
        return self.fc(frames(out))

    def forward(self, spectrogram_B1MT: Tensor) -> Tensor:
        return self.head(self.sequence(spectrogram_B1MT).mean(1))


def frames(map_BCMT: Tensor) -> Tensor:
    """[B,T,M*C]: number m * C + c of a frame is channel c at band m."""
    return map_BCMT.permute(0, 3, 2, 1).flatten(2)
