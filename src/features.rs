//! The features of a probe: a line each, of what it is declared with and what it then has on the device.

use crate::{
    Error, Rules,
    clip::{AdaptiveClip, AdaptiveUnits, LossScale, LossScaleMemory},
    dot::Dots,
    gsnr::{GsnrConfig, Moments, Tracking},
    health::Judge,
    histogram::Histograms,
    history::History,
    micro_batches::MicroBatches,
    probe::Core,
    ranks::{RankLists, Ranks},
    samples::{SampleConfig, Samples},
};

/// What a feature has on the device.
pub(crate) trait Feature<D>: Sized {
    /// Allocates all that the feature needs, as it was declared.
    ///
    /// # Errors
    /// For a declaration that cannot be, and the device's.
    fn new(core: &mut Core, declared: D) -> Result<Self, Error>;
}

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident: $declared:ty => $made:ty;)*) => {
        /// What is declared of each feature, by the methods of [`Config`](crate::Config).
        #[derive(Clone, Debug, Default)]
        #[non_exhaustive]
        pub struct Features {
            $($(#[$doc])* pub $name: Option<$declared>,)*
        }

        /// What was made of that.
        pub(crate) struct Rooms {
            $(pub $name: Option<$made>,)*
        }

        impl Rooms {
            /// All that is declared, in the order of the table.
            pub fn new(core: &mut Core) -> Result<Self, Error> {
                let declared = core.config.features.clone();
                Ok(Self { $($name: declared.$name.map(|declared| Feature::new(core, declared)).transpose()?,)* })
            }
        }
    };
}

features! {
    /// What the loss is multiplied by before `backward`.
    loss_scale: LossScale => LossScaleMemory;
    /// By which each step is diagnosed.
    rules: Rules => Judge;
    /// Steps that are kept on the device.
    history: u32 => History;
    /// Tensors that are tracked across steps.
    tracking: GsnrConfig => Tracking;
    /// Moments of Adam's that are reduced.
    moments: () => Moments;
    /// Elements are counted by their magnitudes.
    histogram: () => Histograms;
    /// Dot products are taken.
    dot: () => Dots;
    /// Elements that are kept of each step.
    samples: SampleConfig => Samples;
    /// The clip of each unit by the norm of its weights.
    adaptive_clip: AdaptiveClip => AdaptiveUnits;
    /// Micro-batches of an accumulation that are measured before they are added up.
    micro_batches: u32 => MicroBatches;
    /// The other ranks, and where elements are.
    ranks: Ranks => RankLists;
}
