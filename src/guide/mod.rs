#![doc = include_str!("README.md")]

/// A trainer on cudarc: your own kernels, your own stream.
#[cfg(feature = "cuda")]
pub mod cudarc {
    #![doc = include_str!("cudarc.md")]
}

/// Mixed precision: the loss scale, and gradients in f16 and bf16.
pub mod mixed_precision {
    #![doc = include_str!("mixed_precision.md")]
}

/// Gradient accumulation.
pub mod accumulation {
    #![doc = include_str!("accumulation.md")]
}

/// Many GPUs.
pub mod many_gpus {
    #![doc = include_str!("many_gpus.md")]
}

/// What each finding means, and what to do.
pub mod findings {
    #![doc = include_str!("findings.md")]
}

/// An optimizer of your own that reads the coefficient.
pub mod optimizers {
    #![doc = include_str!("optimizers.md")]
}

/// What is written, how large it is, and how NaN stands in it.
pub mod files {
    #![doc = include_str!("files.md")]
}

/// How it is tested without a GPU, and what that cannot show.
pub mod proof {
    #![doc = include_str!("proof.md")]
}

/// How fast the CPU backend is.
pub mod speed {
    #![doc = include_str!("speed.md")]
}
