//! `kernels/include/gradprobe.h`, compiled as C11 and as C++17, held against the Rust structs: every field's place and
//! size, every constant, and the values of a report read through the C structs.

use bytemuck::Zeroable;
use gradprobe::{Clip, Config, Cpu, DType, NonFinitePolicy, Plan, Probe, Record, StepOutputs, Tensor};
use std::{fmt::Write as _, fs, io::Write as _, mem::offset_of, path::Path, process::Command};
use std::{path::PathBuf, process::Stdio};
use tempfile::TempDir;

/// A field as Rust has it, and how C prints it.
struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
    format: &'static str,
}

/// Values print as whole numbers, or as the digits that tell a floating-point number from all others.
trait Printed {
    const FORMAT: &'static str;
    fn print(&self) -> String;
}

macro_rules! printed {
    ($($type:ty, $format:literal;)*) => {
        $(impl Printed for $type {
            const FORMAT: &'static str = $format;
            fn print(&self) -> String {
                self.to_string()
            }
        })*
    };
}
printed! { u32, "u"; i32, "d"; u64, "llu"; }

macro_rules! printed_as_bits {
    ($($type:ty, $format:literal;)*) => {
        $(impl Printed for $type {
            const FORMAT: &'static str = $format;
            fn print(&self) -> String {
                format!("{:x}", self.to_bits())
            }
        })*
    };
}
printed_as_bits! { f32, "bits32"; f64, "bits64"; }

impl<const N: usize> Printed for [u32; N] {
    const FORMAT: &'static str = "array";
    fn print(&self) -> String {
        self.iter().map(|word| format!("{word} ")).collect()
    }
}

fn format_of<T: Printed>(_: &T) -> &'static str {
    T::FORMAT
}

/// The fields of a struct, and their values in one of it. A field that is missing here does not compile.
macro_rules! fields {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        let zeroed = $type::zeroed();
        let $type { $($field),* } = zeroed;
        let fields = vec![$(Field {
            name: stringify!($field),
            offset: offset_of!($type, $field),
            size: size_of_val(&$field),
            format: format_of(&$field),
        }),*];
        let values = |of: &$type| -> Vec<String> { vec![$(of.$field.print()),*] };
        (fields, values)
    }};
}

macro_rules! step_outputs {
    () => {
        fields!(StepOutputs {
            total_norm,
            finite_total_norm,
            coefficient_f64,
            total_norm_f32,
            coefficient,
            inverse_coefficient,
            found_inf,
            skip,
            action,
            flags,
            weights,
            step,
            nan_count,
            inf_count,
            health,
            loss_scale,
            next_loss_scale,
            reserved,
        })
    };
}

macro_rules! record {
    () => {
        fields!(Record {
            count,
            nan_count,
            inf_count,
            zero_count,
            dead_count,
            first_nonfinite_index,
            mean_or_zero,
            sum_squared_deviations,
            sum_abs,
            max_abs_or_zero,
            min_nonzero_abs_or_infinity,
        })
    };
}

/// The constants under the names that C gives them.
fn constants() -> Vec<(String, u64)> {
    let bits = [
        ("ACTION_SCALE", StepOutputs::ACTION_SCALE),
        ("ACTION_ZERO_NONFINITE", StepOutputs::ACTION_ZERO_NONFINITE),
        ("ACTION_SCALE_TENSORS", StepOutputs::ACTION_SCALE_TENSORS),
        ("ACTION_CLAMP", StepOutputs::ACTION_CLAMP),
        ("FLAG_NAN", StepOutputs::FLAG_NAN),
        ("FLAG_INF", StepOutputs::FLAG_INF),
        ("FLAG_CLIPPED", StepOutputs::FLAG_CLIPPED),
        ("FLAG_SKIP", StepOutputs::FLAG_SKIP),
        ("FLAG_SPIKE", StepOutputs::FLAG_SPIKE),
        ("FLAG_LOSS_SCALE", StepOutputs::FLAG_LOSS_SCALE),
        ("FLAG_REPLICAS", StepOutputs::FLAG_REPLICAS),
        ("FLAG_STATE", StepOutputs::FLAG_STATE),
    ];
    let named = |(name, bit)| (format!("GRADPROBE_{name}"), u64::from(bit));
    bits.into_iter().map(named).chain([("GRADPROBE_NONE".to_owned(), Record::NONE)]).collect()
}

/// What a struct of that name in C is to hold.
fn print_layout(program: &mut String, name: &str, fields: &[Field]) {
    writeln!(program, "    printf(\"{name} %zu\\n\", sizeof({name}));").unwrap();
    for Field { name: field, .. } in fields {
        writeln!(
            program,
            "    printf(\"{name}.{field} %zu %zu\\n\", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));"
        )
        .unwrap();
    }
}

/// Reads a struct from standard input and prints its fields.
fn print_values(program: &mut String, name: &str, fields: &[Field]) {
    writeln!(program, "    {{ {name} value; if (fread(&value, sizeof value, 1, stdin) != 1) return 1;").unwrap();
    for Field { name: field, size, format, .. } in fields {
        let statement = match *format {
            "bits32" => format!("{{ uint32_t b; memcpy(&b, &value.{field}, 4); printf(\"%x\\n\", b); }}"),
            "bits64" => {
                format!("{{ uint64_t b; memcpy(&b, &value.{field}, 8); printf(\"%llx\\n\", (unsigned long long)b); }}")
            }
            "array" => {
                (0..size / 4).map(|i| format!("printf(\"%u \", value.{field}[{i}]); ")).collect::<String>()
                    + "puts(\"\");"
            }
            "llu" => format!("printf(\"%llu\\n\", (unsigned long long)value.{field});"),
            format => format!("printf(\"%{format}\\n\", value.{field});"),
        };
        writeln!(program, "    {statement}").unwrap();
    }
    program.push_str("    }\n");
}

/// The program in both languages.
fn compiled(body: &str) -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/include");
    let text = format!(
        "#include <gradprobe.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <string.h>\n\
         int main(void) {{\n{body}    return 0;\n}}\n"
    );
    let languages = [("cc", "-std=c11", "program.c"), ("c++", "-std=c++17", "program.cpp")];
    let programs = languages.map(|(compiler, standard, file)| {
        let (source, program) = (folder.path().join(file), folder.path().join(compiler));
        fs::write(&source, &text).unwrap();
        let mut command = Command::new(compiler);
        command.args([standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"]).arg(&include);
        let output = command.arg("-o").arg(&program).arg(&source).output().unwrap();
        assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
        program
    });
    (folder, programs.into())
}

/// What the program prints when it reads these bytes.
fn printed(program: &Path, input: &[u8]) -> Vec<String> {
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn every_field_and_constant_is_where_rust_has_it() {
    let (outputs, _) = step_outputs!();
    let (record, _) = record!();
    let structs = [
        ("gradprobe_step_outputs", size_of::<StepOutputs>(), outputs),
        ("gradprobe_record", size_of::<Record>(), record),
    ];
    let (mut body, mut expected) = (String::new(), Vec::new());
    for (name, size, fields) in &structs {
        print_layout(&mut body, name, fields);
        expected.push(format!("{name} {size}"));
        expected.extend(fields.iter().map(|f| format!("{name}.{} {} {}", f.name, f.offset, f.size)));
        // No byte lies between fields, in which C could have one that is not here.
        assert_eq!(fields.iter().map(|f| f.size).sum::<usize>(), *size, "{name}");
    }
    for (name, value) in constants() {
        writeln!(body, "    printf(\"{name} %llu\\n\", (unsigned long long)({name}));").unwrap();
        expected.push(format!("{name} {value}"));
    }
    let (_folder, programs) = compiled(&body);
    for program in programs {
        assert_eq!(printed(&program, &[]), expected, "{}", program.display());
    }
}

/// A constant of the header that has no line in `constants` would be held to nothing.
#[test]
fn no_constant_of_the_header_is_left_out() {
    let header = include_str!("../kernels/include/gradprobe.h");
    let defined = header.lines().filter_map(|line| line.strip_prefix("#define ")).filter_map(|line| {
        let name = line.split_whitespace().next()?;
        (!name.contains('(') && name != "GRADPROBE_H").then_some(name)
    });
    let known = constants();
    assert_eq!(defined.collect::<Vec<_>>(), known.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
}

#[test]
fn c_reads_what_a_step_left() {
    let mut elements: Vec<f32> = (0..1000u16).map(|i| f32::from(i) - 300.5).collect();
    (elements[17], elements[40], elements[41]) = (f32::NAN, f32::NEG_INFINITY, 0.0);
    let plan = Plan::new([("first", DType::F32, 1000), ("second", DType::F32, 500)]).unwrap();
    let config = Config::default().clip(Clip::global_norm(2.5)).non_finite(NonFinitePolicy::ZeroNonFinite);
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    let tensors: [&dyn Tensor; 2] = [&elements, &&elements[500..]];
    probe.measure(&tensors).unwrap();
    probe.measure(&tensors).unwrap();
    let report = probe.wait().unwrap();

    let (output_fields, output_values) = step_outputs!();
    let (record_fields, record_values) = record!();
    let (mut body, mut expected) = (String::new(), output_values(report.outputs()));
    let mut input = bytemuck::bytes_of(report.outputs()).to_vec();
    print_values(&mut body, "gradprobe_step_outputs", &output_fields);
    for record in report.records() {
        print_values(&mut body, "gradprobe_record", &record_fields);
        expected.extend(record_values(record));
        input.extend(bytemuck::bytes_of(record));
    }
    assert!(expected.iter().any(|value| value == "17"), "the place of the first NaN");
    let (_folder, programs) = compiled(&body);
    for program in programs {
        assert_eq!(printed(&program, &input), expected, "{}", program.display());
    }
}
