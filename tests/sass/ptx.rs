//! The PTX in the binary, from which a driver makes code for what is newer than all the architectures.

use crate::dump;
use gradprobe::launch::Kernel;

/// The opcodes of a kernel's instructions, with their modifiers: `add.rn.f32`.
pub fn opcodes<'a>(kernel: &str, output: &'a str) -> Vec<&'a str> {
    let entry = format!(".entry {kernel}(");
    let lines = output.lines().skip_while(|line| !line.contains(&entry)).skip(1);
    let statements = lines.take_while(|line| !line.contains(".entry ")).flat_map(|line| line.split(['{', '}', ';']));
    let opcode = |statement: &'a str| {
        let mut words = statement.split_whitespace();
        let first = words.next()?;
        if first.starts_with('@') { words.next() } else { Some(first) }
    };
    statements.filter_map(opcode).filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

/// Why an instruction on floats is not one IEEE operation, rounded to nearest; `None` for all others.
pub fn objection(opcode: &str) -> Option<&'static str> {
    let parts: Vec<&str> = opcode.split('.').collect();
    let has = |wanted: &[&str]| parts.iter().any(|part| wanted.contains(part));
    const FLOATS: &[&str] = &["f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"];
    if has(&["ftz"]) {
        return Some("subnormals are flushed");
    }
    if has(&["approx", "full"]) {
        return Some("an approximation");
    }
    if has(&["sat", "relu"]) && has(FLOATS) {
        return Some("clamped");
    }
    let rounds = match parts[0] {
        "add" | "sub" | "mul" | "fma" | "mad" | "div" | "sqrt" | "rcp" => has(FLOATS),
        // From a wider float, or from an integer; what goes to a wider one, or to an integer, is exact or says how.
        "cvt" => matches!(
            parts[parts.len() - 2..],
            ["f16" | "bf16", "f32" | "f64"]
                | ["f32", "f64"]
                | ["f16" | "bf16" | "f32" | "f64", "u32" | "s32" | "u64" | "s64"]
        ),
        _ => false,
    };
    (rounds && !has(&["rn"])).then_some("not rounded to nearest")
}

/// By the flags of build.rs: no contraction, no flush, exact division and root. The driver adds nothing of its own to
/// operations that name their rounding.
#[test]
fn every_operation_on_floats_is_rounded_to_nearest() {
    let Some(output) = dump::ptx() else { return };
    let mut rounded = 0;
    for kernel in Kernel::ALL {
        let opcodes = opcodes(kernel.entry(), output);
        assert!(opcodes.len() > 50, "{}: {} instructions", kernel.entry(), opcodes.len());
        let objections: Vec<_> = opcodes.iter().filter_map(|code| Some((code, objection(code)?))).collect();
        assert_eq!(objections, [], "{}", kernel.entry());
        let here = opcodes.iter().filter(|code| code.split('.').any(|part| part == "rn")).count();
        println!("{}: {} instructions, {here} with .rn", kernel.entry(), opcodes.len());
        rounded += here;
    }
    assert!(rounded > 3000, "{rounded} operations with .rn: are all found?");
    for word in [".ftz", ".approx"] {
        assert!(!output.contains(word), "{word} in the PTX");
    }
}
