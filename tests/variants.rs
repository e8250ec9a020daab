//! The variants of the kernels that wait for a GPU (`benches/gpu/variants.py`): each must fit the kernels as they are.

mod require;

use require::skipped;
use std::{path::Path, process::Command};

#[test]
fn every_variant_fits_the_kernels() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu/variants.py");
    match Command::new("python3").arg(script).arg("check").output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => skipped(require::PYTHON, &format!("there is no python3: {error}")),
    }
}
