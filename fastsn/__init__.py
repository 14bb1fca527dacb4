"""fastsn: spectral normalization (SN, SSN, BSN, BSSN) for PyTorch."""

from fastsn.backends import Backend, backends
from fastsn.distributed import copy_vectors, sync
from fastsn.interop.convert import convert
from fastsn.interop.state_dict import convert_state_dict
from fastsn.layers import (
    BSNConv1d,
    BSNConv2d,
    BSNConv3d,
    BSNConvTranspose1d,
    BSNConvTranspose2d,
    BSNConvTranspose3d,
    BSNEmbedding,
    BSNLinear,
    BSSNConv1d,
    BSSNConv2d,
    BSSNConv3d,
    BSSNConvTranspose1d,
    BSSNConvTranspose2d,
    BSSNConvTranspose3d,
    BSSNEmbedding,
    BSSNLinear,
    SNConv1d,
    SNConv2d,
    SNConv3d,
    SNConvTranspose1d,
    SNConvTranspose2d,
    SNConvTranspose3d,
    SNEmbedding,
    SNLinear,
    SSNConv1d,
    SSNConv2d,
    SSNConv3d,
    SSNConvTranspose1d,
    SSNConvTranspose2d,
    SSNConvTranspose3d,
    SSNEmbedding,
    SSNLinear,
)
from fastsn.memory import release_memory
from fastsn.model.scopes import fuse, step
from fastsn.model.tools import Sigmas, advance, fold, sigmas, warm_up
from fastsn.norm import SpectralNorm
from fastsn.ops import cuda as _cuda
from fastsn.parametrize import spectral_norm
from fastsn.recomputation import recompute
from fastsn.variants import VARIANTS

__version__ = "0.1.0"

_cuda.register()

__all__ = [
    "BSNConv1d",
    "BSNConv2d",
    "BSNConv3d",
    "BSNConvTranspose1d",
    "BSNConvTranspose2d",
    "BSNConvTranspose3d",
    "BSNEmbedding",
    "BSNLinear",
    "BSSNConv1d",
    "BSSNConv2d",
    "BSSNConv3d",
    "BSSNConvTranspose1d",
    "BSSNConvTranspose2d",
    "BSSNConvTranspose3d",
    "BSSNEmbedding",
    "BSSNLinear",
    "SNConv1d",
    "SNConv2d",
    "SNConv3d",
    "SNConvTranspose1d",
    "SNConvTranspose2d",
    "SNConvTranspose3d",
    "SNEmbedding",
    "SNLinear",
    "SSNConv1d",
    "SSNConv2d",
    "SSNConv3d",
    "SSNConvTranspose1d",
    "SSNConvTranspose2d",
    "SSNConvTranspose3d",
    "SSNEmbedding",
    "SSNLinear",
    "Backend",
    "Sigmas",
    "SpectralNorm",
    "VARIANTS",
    "advance",
    "backends",
    "convert_state_dict",
    "copy_vectors",
    "convert",
    "fold",
    "fuse",
    "recompute",
    "release_memory",
    "sigmas",
    "spectral_norm",
    "step",
    "sync",
    "warm_up",
]
