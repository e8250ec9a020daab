//! Every call of the driver, and of NCCL, that a script over all features makes, failed in turn, as the host driver in
//! `crates/driver` can: with an error that the next call does not have, without memory, with a context that is lost, with work
//! that comes late, with peers that hang. After each the probe gives the right bits again or says that it is lost; nothing
//! panics, hangs, is used after it is freed, or is left. Skipped on any other driver.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "calls functions of the host driver, and graphs and bare addresses are its own")]

mod driver;
#[cfg(feature = "nccl")]
mod ranks;
#[path = "../require/mod.rs"]
mod require;
mod run;
mod scenes;

/// A test of each script.
#[macro_export]
macro_rules! every_call {
    ($($(#[doc = $doc:literal])* $name:ident = |$run:ident| $script:block)*) => {$(
        $(#[doc = $doc])*
        #[test]
        fn $name() {
            fn script($run: &mut Run) $script
            $crate::run::fail_every_call(stringify!($name), script);
        }
    )*};
}
