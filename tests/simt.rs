//! The kernels on the host over the table of cases: the same bits as the CPU backend, in whatever order threads and
//! blocks run, on however many blocks.

mod common;

use common::{Effort, run_all};
use gradprobe_simt::{Schedule, Simt, SimtProbe};

/// A sanitizer makes the kernels four times slower; it need not see every misalignment of every case.
const EFFORT: Effort = Effort { large: true, offsets: 4 };

#[test]
fn kernels_conform_and_equal_the_cpu() {
    run_all(&mut |plan, config| Box::new(SimtProbe::new(plan, config).unwrap()), &EFFORT);
}
