//! The features of a probe: a line each, with its declaration and its memory on the device. The methods of
//! [`Config`](crate::Config) that declare them are in their rooms.

use crate::{Error, probe::Core};

/// A feature's memory on the device.
pub(crate) trait Feature<D>: Sized {
    /// Allocates all that the feature needs, as it was declared.
    ///
    /// # Errors
    /// For an invalid declaration, and the device's.
    fn new(core: &mut Core, declared: D) -> Result<Self, Error>;
}

/// A feature with state from step to step.
pub(crate) trait Saved {
    /// The call that declares it.
    const DECLARE: &'static str;
    /// The state, on the host.
    type State;

    /// Gives the state after the last launch, for which it waits.
    ///
    /// # Errors
    /// The device's.
    fn state(&mut self, core: &Core) -> Result<Self::State, Error>;

    /// Checks that this is the state of a feature with the same declaration, for the same plan.
    ///
    /// # Errors
    /// [`Error::StateOfAnotherProbe`].
    fn check(&self, core: &Core, state: &Self::State) -> Result<(), Error>;

    /// Goes on from this state, which was checked.
    ///
    /// # Errors
    /// The device's.
    fn restore(&mut self, core: &Core, state: &Self::State) -> Result<(), Error>;
}

macro_rules! features {
    ($($name:ident: $declared:ty => $made:ty;)*) => {
        /// The declaration of each feature, by the methods of [`Config`](crate::Config).
        #[doc(hidden)]
        #[derive(Clone, Debug, Default)]
        #[non_exhaustive]
        pub struct Features {
            $(pub $name: Option<$declared>,)*
        }

        /// The rooms made from it.
        pub(crate) struct Rooms {
            $(pub $name: Option<$made>,)*
        }

        impl Rooms {
            /// Makes all that is declared, in the order of the table.
            pub fn new(core: &mut Core) -> Result<Self, Error> {
                let declared = core.config.features.clone();
                Ok(Self { $($name: declared.$name.map(|declared| Feature::new(core, declared)).transpose()?,)* })
            }
        }
    };
}

features! {
    loss_scale: crate::clip::LossScale => crate::clip::LossScaleMemory;
    rules: crate::Rules => crate::health::Judge;
    history: u32 => crate::history::History;
    tracking: crate::gsnr::GsnrConfig => crate::gsnr::Tracking;
    moments: () => crate::gsnr::Moments;
    histogram: () => crate::histogram::Histograms;
    dot: () => crate::dot::Dots;
    samples: crate::samples::SampleConfig => crate::samples::Samples;
    adaptive_clip: crate::clip::AdaptiveClip => crate::clip::AdaptiveUnits;
    optimizer: crate::optim::Optimizer => crate::optim::OptimizerMemory;
    micro_batches: u32 => crate::micro_batches::MicroBatches;
    ranks: crate::ranks::Ranks => crate::ranks::RankMemory;
}
