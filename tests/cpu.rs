//! The CPU backend over the table of cases.
mod common;
use common::{Effort, run_all};
use gradprobe::CpuProbe;

#[test]
fn conforms() {
    run_all(&mut |plan, config| Box::new(CpuProbe::new(plan, config).unwrap()), &Effort::FULL);
}

#[test]
fn table_stays_small() {
    let cases = common::cases::cases();
    for c in &cases {
        println!("{} {} {}", c.name, c.tensors.len(), c.elements());
    }
    let total: usize = cases.iter().map(|c| c.elements()).sum();
    let large: usize = cases.iter().filter(|c| c.large).map(|c| c.elements()).sum();
    println!("{} cases {total} {large}", cases.len());
}
