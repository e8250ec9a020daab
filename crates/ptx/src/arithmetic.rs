//! What each instruction computes that looks at nothing but its operands, by the words of the PTX ISA: one table, by opcode
//! with all its modifiers. An opcode that is not here is not understood.
//!
//! A register holds its bits in the lowest of 64; those above its width are 0. A predicate is 0 or 1. Where the ISA leaves a
//! result open, the value is an unusual one, so that whoever depends on it is found: a NaN that an instruction of f64 makes
//! or passes on, an absolute value or negation of a NaN, a quotient by 0.

use half::f16;
use std::{collections::HashMap, sync::LazyLock};

/// Where the memory that a block shares begins among generic addresses: where no memory of a process is.
pub const SHARED_WINDOW: u64 = 1 << 62;

/// A register of the 32 lanes of a warp.
pub type Lanes = [u64; 32];

/// From three operands, of which the last may be unused, to a result.
pub type Function = fn(&Lanes, &Lanes, &Lanes, &mut Lanes);

/// "Single-precision instructions return an unspecified NaN"; GPUs give this one.
const NAN_F32: u32 = 0x7fff_ffff;
/// "NaN payloads are supported for double-precision instructions", but not that of which operand, nor of what is invalid.
const NAN_F64: u64 = 0x7fff_dead_beef_7fff;
/// "Half-precision instructions return an unspecified NaN"; GPUs give this one.
const NAN_F16: u16 = 0x7fff;
/// "Division by zero yields an unspecified, machine-specific value."
const QUOTIENT_BY_ZERO: u64 = 0xd1f1_0000_d1f1_0000;

fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}
fn f64_of(bits: u64) -> f64 {
    f64::from_bits(bits)
}
fn f16_of(bits: u64) -> f16 {
    f16::from_bits(bits as u16)
}
fn of_f32(value: f32) -> u64 {
    u64::from(if value.is_nan() { NAN_F32 } else { value.to_bits() })
}
fn of_f64(value: f64) -> u64 {
    if value.is_nan() { NAN_F64 } else { value.to_bits() }
}
fn of_f16(value: f16) -> u64 {
    u64::from(if value.is_nan() { NAN_F16 } else { value.to_bits() })
}
fn signed16(bits: u64) -> i16 {
    (bits as u16).cast_signed()
}
fn signed32(bits: u64) -> i32 {
    (bits as u32).cast_signed()
}
fn signed64(bits: u64) -> i64 {
    bits.cast_signed()
}
fn of_signed16(value: i16) -> u64 {
    u64::from(value.cast_unsigned())
}
fn of_signed32(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}
fn of_signed64(value: i64) -> u64 {
    value.cast_unsigned()
}

/// A function of whole registers, from one of a lane.
macro_rules! each_lane {
    (|$a:pat_param, $b:pat_param, $c:pat_param| $result:expr) => {{
        fn run(x: &Lanes, y: &Lanes, z: &Lanes, to: &mut Lanes) {
            for lane in 0..32 {
                let ($a, $b, $c) = (x[lane], y[lane], z[lane]);
                to[lane] = $result;
            }
        }
        run as Function
    }};
}

/// How many source operands an opcode has, and its function.
#[derive(Clone, Copy)]
pub struct Meaning {
    pub sources: usize,
    pub function: Function,
}

/// Opcodes that read so many operands.
macro_rules! table {
    ($to:ident; $($($opcode:literal)|+ => |$a:pat_param $(, $b:pat_param $(, $c:pat_param)?)?| $result:expr;)*) => {
        $(
            let sources = [stringify!($a) $(, stringify!($b) $(, stringify!($c))?)?].len();
            let function = table!(@lanes $a $(, $b $(, $c)?)? => $result);
            $($to.insert($opcode.to_owned(), Meaning { sources, function });)+
        )*
    };
    (@lanes $a:pat_param => $result:expr) => { each_lane!(|$a, _, _| $result) };
    (@lanes $a:pat_param, $b:pat_param => $result:expr) => { each_lane!(|$a, $b, _| $result) };
    (@lanes $a:pat_param, $b:pat_param, $c:pat_param => $result:expr) => { each_lane!(|$a, $b, $c| $result) };
}

/// All comparisons of integers of one type.
macro_rules! compare_integers {
    ($to:ident; $($of:literal: $value:path;)*) => {
        $(
            compare_integers!(@one $to, $of, $value, ("eq", ==), ("ne", !=), ("lt", <), ("le", <=), ("gt", >), ("ge", >=));
        )*
    };
    (@one $to:ident, $of:literal, $value:path, $(($name:literal, $operator:tt)),*) => {
        $(
            let function = each_lane!(|a, b, _| u64::from($value(a) $operator $value(b)));
            $to.insert(concat!("setp.", $name, ".", $of).to_owned(), Meaning { sources: 2, function });
        )*
    };
}

/// All comparisons of floats of one type: false when an operand is NaN, and of the names that end in `u` true.
macro_rules! compare_floats {
    ($to:ident; $($of:literal: $value:path;)*) => {
        $(
            compare_floats!(@ordered $to, $of, $value, ("eq", ==), ("lt", <), ("le", <=), ("gt", >), ("ge", >=));
            compare_floats!(@any $to, $of, $value, ("equ", ==), ("neu", !=), ("ltu", <), ("leu", <=), ("gtu", >), ("geu", >=));
            let differ = each_lane!(|a, b, _| u64::from($value(a) < $value(b) || $value(a) > $value(b)));
            $to.insert(concat!("setp.ne.", $of).to_owned(), Meaning { sources: 2, function: differ });
            let numbers = each_lane!(|a, b, _| u64::from(!$value(a).is_nan() && !$value(b).is_nan()));
            $to.insert(concat!("setp.num.", $of).to_owned(), Meaning { sources: 2, function: numbers });
            let any_nan = each_lane!(|a, b, _| u64::from($value(a).is_nan() || $value(b).is_nan()));
            $to.insert(concat!("setp.nan.", $of).to_owned(), Meaning { sources: 2, function: any_nan });
        )*
    };
    (@ordered $to:ident, $of:literal, $value:path, $(($name:literal, $operator:tt)),*) => {
        $(
            let function = each_lane!(|a, b, _| u64::from($value(a) $operator $value(b)));
            $to.insert(concat!("setp.", $name, ".", $of).to_owned(), Meaning { sources: 2, function });
        )*
    };
    (@any $to:ident, $of:literal, $value:path, $(($name:literal, $operator:tt)),*) => {
        $(
            let function = each_lane!(|a, b, _| {
                let (a, b) = ($value(a), $value(b));
                u64::from(a.is_nan() || b.is_nan() || a $operator b)
            });
            $to.insert(concat!("setp.", $name, ".", $of).to_owned(), Meaning { sources: 2, function });
        )*
    };
}

/// A float to an integer: cut, and limited to the integer's range. "NaN input results in: zero if source is not .f64 and
/// destination is not .s64, .u64; otherwise 1 << (width of the destination - 1)."
macro_rules! to_integer {
    ($value:expr, $integer:ty, $of_nan:expr) => {{
        let value = $value;
        if value.is_nan() { $of_nan } else { value as $integer }
    }};
}

/// "Subnormal inputs and results are flushed to sign-preserving zero."
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

fn flushed_f64(value: f64) -> f64 {
    if value.is_subnormal() { 0f64.copysign(value) } else { value }
}

/// "+0.0 > -0.0", and a NaN only where both are.
fn larger(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        _ => {
            if a > b {
                a
            } else {
                b
            }
        }
    }
}
fn smaller(a: f64, b: f64) -> f64 {
    -larger(-a, -b)
}

fn divide<T: PartialEq + Default + Into<u64>>(a: T, b: T, by: impl Fn(T, T) -> T) -> u64 {
    if b == T::default() { QUOTIENT_BY_ZERO } else { by(a, b).into() }
}

/// "Shift amounts greater than the register width are clamped" to it.
fn shift_left(value: u64, amount: u64, width: u32) -> u64 {
    let amount = amount as u32;
    if amount >= width { 0 } else { (value << amount) & (u64::MAX >> (64 - width)) }
}
fn shift_right(value: u64, amount: u64, width: u32) -> u64 {
    let amount = amount as u32;
    if amount >= width { 0 } else { value >> amount }
}

/// prmt in its default mode: "the msb defines if the byte value should be copied, or if the sign (msb of the byte) should
/// be replicated over all 8 bits of the target position (sign extend of the byte value)".
fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(a as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&(b as u32).to_le_bytes());
    let chosen = [0, 4, 8, 12].map(|at| {
        let nibble = (selector >> at) as usize;
        let byte = bytes[nibble & 7];
        match (nibble & 8, byte & 0x80) {
            (0, _) => byte,
            (_, 0) => 0x00,
            _ => 0xff,
        }
    });
    u64::from(u32::from_le_bytes(chosen))
}

/// Two halves at a time.
fn halves(a: u64, b: u64, of: impl Fn(u16, u16) -> u16) -> u64 {
    u64::from(of(a as u16, b as u16)) | u64::from(of((a >> 16) as u16, (b >> 16) as u16)) << 16
}

fn dot_signed(a: u64, b: u64, c: u64) -> u64 {
    let (a, b) = ((a as u32).to_le_bytes(), (b as u32).to_le_bytes());
    let products = a.iter().zip(b).map(|(a, b)| i32::from(a.cast_signed()) * i32::from(b.cast_signed()));
    of_signed32(products.fold(signed32(c), i32::wrapping_add))
}

fn dot_unsigned(a: u64, b: u64, c: u64) -> u64 {
    let (a, b) = ((a as u32).to_le_bytes(), (b as u32).to_le_bytes());
    let products = a.iter().zip(b).map(|(a, b)| u32::from(*a) * u32::from(b));
    u64::from(products.fold(c as u32, u32::wrapping_add))
}

/// The lowest bits of `a` in place of a run of `b`'s: its first in the low byte of `run`, its length in the next.
fn insert(a: u64, b: u64, run: u64, bits: u64) -> u64 {
    let (first, length) = (run & 0xff, run >> 8);
    (first..bits.min(first + length)).fold(b, |all, at| all & !(1 << at) | (a >> (at - first) & 1) << at)
}

/// The meaning of an opcode with all its modifiers.
pub fn meaning(opcode: &str) -> Option<Meaning> {
    static TABLE: LazyLock<HashMap<String, Meaning>> = LazyLock::new(all);
    TABLE.get(opcode).copied()
}

fn all() -> HashMap<String, Meaning> {
    let mut to = HashMap::new();
    integers(&mut to);
    floats(&mut to);
    moves_and_conversions(&mut to);
    compare_integers! { to;
        "b16": u64::from; "u16": u64::from; "s16": signed16;
        "b32": u64::from; "u32": u64::from; "s32": signed32;
        "b64": u64::from; "u64": u64::from; "s64": signed64;
    }
    compare_floats! { to; "f32": f32_of; "f64": f64_of; }
    to
}

fn integers(to: &mut HashMap<String, Meaning>) {
    table! { to;
        "add.u16" | "add.s16" => |a, b| u64::from((a as u16).wrapping_add(b as u16));
        "add.u32" | "add.s32" => |a, b| u64::from((a as u32).wrapping_add(b as u32));
        "add.u64" | "add.s64" => |a, b| a.wrapping_add(b);
        "sub.u16" | "sub.s16" => |a, b| u64::from((a as u16).wrapping_sub(b as u16));
        "sub.u32" | "sub.s32" => |a, b| u64::from((a as u32).wrapping_sub(b as u32));
        "sub.u64" | "sub.s64" => |a, b| a.wrapping_sub(b);
        "add.u16x2" | "add.s16x2" => |a, b| halves(a, b, u16::wrapping_add);
        "min.u16x2" => |a, b| halves(a, b, u16::min);
        "max.u16x2" => |a, b| halves(a, b, u16::max);
        "mul.lo.u16" | "mul.lo.s16" => |a, b| u64::from((a as u16).wrapping_mul(b as u16));
        "mul.lo.u32" | "mul.lo.s32" => |a, b| u64::from((a as u32).wrapping_mul(b as u32));
        "mul.lo.u64" | "mul.lo.s64" => |a, b| a.wrapping_mul(b);
        "mul.hi.u32" => |a, b| (u64::from(a as u32) * u64::from(b as u32)) >> 32;
        "mul.hi.u64" => |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64;
        "mul.wide.u16" => |a, b| u64::from(u32::from(a as u16) * u32::from(b as u16));
        "mul.wide.u32" => |a, b| u64::from(a as u32) * u64::from(b as u32);
        "mul.wide.s16" => |a, b| of_signed32(i32::from(signed16(a)) * i32::from(signed16(b)));
        "mul.wide.s32" => |a, b| of_signed64(i64::from(signed32(a)) * i64::from(signed32(b)));
        "mad.lo.u32" | "mad.lo.s32" => |a, b, c| u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32));
        "mad.lo.u64" | "mad.lo.s64" => |a, b, c| a.wrapping_mul(b).wrapping_add(c);
        "mad.wide.u32" => |a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c);
        "mad.wide.s32" => |a, b, c| of_signed64((i64::from(signed32(a)) * i64::from(signed32(b))).wrapping_add(signed64(c)));
        "div.u32" => |a, b| divide(a as u32, b as u32, |a, b| a / b) & 0xffff_ffff;
        "div.u64" => |a, b| divide(a, b, |a, b| a / b);
        "rem.u32" => |a, b| divide(a as u32, b as u32, |a, b| a % b) & 0xffff_ffff;
        "rem.u64" => |a, b| divide(a, b, |a, b| a % b);
        "min.u16" | "min.u32" | "min.u64" => |a, b| a.min(b);
        "max.u16" | "max.u32" | "max.u64" => |a, b| a.max(b);
        "min.s32" => |a, b| of_signed32(signed32(a).min(signed32(b)));
        "max.s32" => |a, b| of_signed32(signed32(a).max(signed32(b)));
        "min.s64" => |a, b| of_signed64(signed64(a).min(signed64(b)));
        "max.s64" => |a, b| of_signed64(signed64(a).max(signed64(b)));
        "neg.s16" => |a| of_signed16(signed16(a).wrapping_neg());
        "neg.s32" => |a| of_signed32(signed32(a).wrapping_neg());
        "neg.s64" => |a| of_signed64(signed64(a).wrapping_neg());
        "and.pred" | "and.b16" | "and.b32" | "and.b64" => |a, b| a & b;
        "or.pred" | "or.b16" | "or.b32" | "or.b64" => |a, b| a | b;
        "xor.pred" | "xor.b16" | "xor.b32" | "xor.b64" => |a, b| a ^ b;
        "not.pred" => |a| a ^ 1;
        "not.b16" => |a| a ^ 0xffff;
        "not.b32" => |a| a ^ 0xffff_ffff;
        "not.b64" => |a| !a;
        "shl.b16" => |a, b| shift_left(a, b, 16);
        "shl.b32" => |a, b| shift_left(a, b, 32);
        "shl.b64" => |a, b| shift_left(a, b, 64);
        "shr.u16" | "shr.b16" => |a, b| shift_right(a, b, 16);
        "shr.u32" | "shr.b32" => |a, b| shift_right(a, b, 32);
        "shr.u64" | "shr.b64" => |a, b| shift_right(a, b, 64);
        "shr.s32" => |a, b| of_signed32(signed32(a) >> (b as u32).min(31));
        "shr.s64" => |a, b| of_signed64(signed64(a) >> (b as u32).min(63));
        "popc.b32" | "popc.b64" => |a| u64::from(a.count_ones());
        "clz.b32" => |a| u64::from((a as u32).leading_zeros());
        "clz.b64" => |a| u64::from(a.leading_zeros());
        "shf.r.wrap.b32" => |a, b, c| (b << 32 | a & 0xffff_ffff) >> (c & 31) & 0xffff_ffff;
        "bfi.b32" => |a, b, c| insert(a, b, c, 32);
        "bfi.b64" => |a, b, c| insert(a, b, c, 64);
        "prmt.b32" => |a, b, c| permute(a, b, c);
        "dp4a.s32.s32" => |a, b, c| dot_signed(a, b, c);
        "dp4a.u32.u32" => |a, b, c| dot_unsigned(a, b, c);
    }
}

// Each operation is rounded once, to nearest, and subnormals are kept but where .ftz says otherwise. Without `.rn` an addition
// or a product may be contracted by whoever compiles on; here it is not, as it need not be. An approximation is as exact as it
// can be: its error is within the bound, and users' kernels, which alone have any, may not need more.
fn floats(to: &mut HashMap<String, Meaning>) {
    table! { to;
        "add.rn.f32" | "add.f32" => |a, b| of_f32(f32_of(a) + f32_of(b));
        "sub.rn.f32" | "sub.f32" => |a, b| of_f32(f32_of(a) - f32_of(b));
        "mul.rn.f32" | "mul.f32" => |a, b| of_f32(f32_of(a) * f32_of(b));
        "fma.rn.f32" => |a, b, c| of_f32(f32_of(a).mul_add(f32_of(b), f32_of(c)));
        "div.rn.f32" => |a, b| of_f32(f32_of(a) / f32_of(b));
        "rcp.rn.f32" => |a| of_f32(1.0 / f32_of(a));
        "sqrt.rn.f32" => |a| of_f32(f32_of(a).sqrt());
        "abs.f32" => |a| of_f32(f32_of(a).abs());
        "neg.f32" => |a| of_f32(-f32_of(a));
        "copysign.f32" => |a, b| (a & 0x8000_0000) | (b & 0x7fff_ffff);
        "copysign.f64" => |a, b| (a & 1 << 63) | (b & !(1 << 63));
        "ex2.approx.ftz.f32" => |a| of_f32(flushed(flushed(f32_of(a)).exp2()));
        "rcp.approx.ftz.f32" => |a| of_f32(flushed(1.0 / flushed(f32_of(a))));
        // "The most significant 32 bits of the result", of those of the operand.
        "rcp.approx.ftz.f64" => |a| {
            of_f64(flushed_f64(1.0 / flushed_f64(f64_of(a & !0xffff_ffff)))) & !0xffff_ffff
        };
        "min.f32" => |a, b| of_f32(smaller(f64::from(f32_of(a)), f64::from(f32_of(b))) as f32);
        "max.f32" => |a, b| of_f32(larger(f64::from(f32_of(a)), f64::from(f32_of(b))) as f32);
        "add.rn.f64" | "add.f64" => |a, b| of_f64(f64_of(a) + f64_of(b));
        "sub.rn.f64" | "sub.f64" => |a, b| of_f64(f64_of(a) - f64_of(b));
        "mul.rn.f64" | "mul.f64" => |a, b| of_f64(f64_of(a) * f64_of(b));
        "fma.rn.f64" => |a, b, c| of_f64(f64_of(a).mul_add(f64_of(b), f64_of(c)));
        "div.rn.f64" => |a, b| of_f64(f64_of(a) / f64_of(b));
        "rcp.rn.f64" => |a| of_f64(1.0 / f64_of(a));
        "sqrt.rn.f64" => |a| of_f64(f64_of(a).sqrt());
        "abs.f64" => |a| of_f64(f64_of(a).abs());
        "neg.f64" => |a| of_f64(-f64_of(a));
        "min.f64" => |a, b| of_f64(smaller(f64_of(a), f64_of(b)));
        "max.f64" => |a, b| of_f64(larger(f64_of(a), f64_of(b)));
    }
}

fn moves_and_conversions(to: &mut HashMap<String, Meaning>) {
    table! { to;
        "mov.pred" | "mov.b16" | "mov.u16" | "mov.s16" | "mov.b32" | "mov.u32" | "mov.s32" | "mov.f32" | "mov.b64"
            | "mov.u64" | "mov.s64" | "mov.f64" => |a| a;
        "selp.b16" | "selp.u16" | "selp.s16" | "selp.b32" | "selp.u32" | "selp.s32" | "selp.f32" | "selp.b64"
            | "selp.u64" | "selp.s64" | "selp.f64" => |a, b, c| if c == 0 { b } else { a };
        // Global addresses are generic ones; a block's own memory is a window of these.
        "cvta.to.global.u64" | "cvta.global.u64" => |a| a;
        "cvta.shared.u64" => |a| a.wrapping_add(SHARED_WINDOW);
        "cvta.to.shared.u64" => |a| a.wrapping_sub(SHARED_WINDOW);
        // Between integers: the destination's lowest bits, or the source's value in more of them.
        "cvt.u16.u8" | "cvt.u32.u8" | "cvt.u64.u8" => |a| a & 0xff;
        "cvt.u16.u32" | "cvt.u16.u64" | "cvt.s16.s32" | "cvt.s16.u32" | "cvt.u32.u16" | "cvt.u64.u16" => |a| a & 0xffff;
        "cvt.s32.s64" | "cvt.s32.u64" | "cvt.u32.s64" | "cvt.u64.u32" | "cvt.s64.u32" => |a| a & 0xffff_ffff;
        "cvt.s32.s16" => |a| of_signed32(i32::from(signed16(a)));
        "cvt.s64.s32" => |a| of_signed64(i64::from(signed32(a)));
        "cvt.rn.f32.u16" => |a| of_f32(f32::from(a as u16));
        "cvt.rn.f32.u32" => |a| of_f32(a as u32 as f32);
        "cvt.rn.f32.s32" => |a| of_f32(signed32(a) as f32);
        "cvt.rn.f32.u64" => |a| of_f32(a as f32);
        "cvt.rn.f64.u32" => |a| of_f64(f64::from(a as u32));
        "cvt.rn.f64.s32" => |a| of_f64(f64::from(signed32(a)));
        "cvt.rn.f64.u64" => |a| of_f64(a as f64);
        "cvt.rn.f64.s64" => |a| of_f64(signed64(a) as f64);
        "cvt.rzi.u32.f32" => |a| u64::from(to_integer!(f32_of(a), u32, 0));
        "cvt.rzi.u64.f32" => |a| to_integer!(f32_of(a), u64, 1 << 63);
        "cvt.rzi.u32.f64" => |a| u64::from(to_integer!(f64_of(a), u32, 1 << 31));
        "cvt.rzi.u64.f64" => |a| to_integer!(f64_of(a), u64, 1 << 63);
        "cvt.rni.f64.f64" => |a| of_f64(f64_of(a).round_ties_even());
        "cvt.rzi.f64.f64" => |a| of_f64(f64_of(a).trunc());
        "cvt.rmi.f64.f64" => |a| of_f64(f64_of(a).floor());
        "cvt.rpi.f64.f64" => |a| of_f64(f64_of(a).ceil());
        "cvt.f64.f32" => |a| of_f64(f64::from(f32_of(a)));
        "cvt.rn.f32.f64" => |a| of_f32(f64_of(a) as f32);
        // Of the two floats around the value, the nearest may be the one further from zero.
        "cvt.rz.f32.f64" => |a| {
            let (wide, near) = (f64_of(a), f64_of(a) as f32);
            of_f32(if f64::from(near).abs() > wide.abs() { f32::from_bits(near.to_bits() - 1) } else { near })
        };
        "cvt.rz.f16.f32" => |a| {
            let (wide, near) = (f32_of(a), f16::from_f32(f32_of(a)));
            of_f16(if near.to_f32().abs() > wide.abs() { f16::from_bits(near.to_bits() - 1) } else { near })
        };
        "cvt.f32.f16" => |a| of_f32(f16_of(a).to_f32());
        "cvt.rn.f16.f32" => |a| of_f16(f16::from_f32(f32_of(a)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(opcode: &str, a: u64, b: u64, c: u64) -> u64 {
        let mut to = [0; 32];
        (meaning(opcode).unwrap_or_else(|| panic!("{opcode}")).function)(&[a; 32], &[b; 32], &[c; 32], &mut to);
        assert_eq!(to, [to[0]; 32]);
        to[0]
    }

    /// By hand, from the ISA's words.
    #[test]
    fn instructions_do_what_the_isa_says() {
        let (one, nan, minus_zero) = (1f32.to_bits().into(), 0x7f80_0001, 0x8000_0000);
        for (opcode, [a, b, c], expected) in [
            ("shf.r.wrap.b32", [0x8001_7fff, 0x1234_8056, 16], 0x8056_8001),
            ("shf.r.wrap.b32", [0x8001_7fff, 0x1234_8056, 32], 0x8001_7fff),
            ("bfi.b64", [0xffff_ffff_1234_5678, 0x9abc_def0, 0x2020], 0x1234_5678_9abc_def0),
            ("bfi.b32", [0xff, 0, 0x1018], 0xff00_0000),
            ("bfi.b64", [7, 5, 0], 5),
            ("prmt.b32", [0x8001_7fff, 0x1234_8056, 0xfdb9], 0x00ff_ff00),
            ("prmt.b32", [0x8001_7fff, 0x1234_8056, 0x7531], 0x1280_807f),
            ("prmt.b32", [0x3322_1100, 0x7766_5544, 0x0123], 0x0011_2233),
            ("dp4a.s32.s32", [0xff80_7f01, 0x01ff_0201, 5], 5 + 1 + 254 + 128 - 1),
            ("dp4a.u32.u32", [0xff80_7f01, 0x01ff_0201, 5], 5 + 1 + 254 + 128 * 255 + 255),
            ("add.s32", [0xffff_ffff, 1, 0], 0),
            ("add.u16x2", [0xffff_8000, 0x0001_8001, 0], 0x0000_0001),
            ("max.u16x2", [0x0001_8000, 0x0002_7fff, 0], 0x0002_8000),
            ("shl.b32", [1, 31, 0], 0x8000_0000),
            ("shl.b32", [1, 32, 0], 0),
            ("shr.u32", [0x8000_0000, 0xffff_ffff, 0], 0),
            ("shr.s32", [0x8000_0000, 77, 0], 0xffff_ffff),
            ("sub.s64", [0, 1, 0], u64::MAX),
            ("mul.wide.u32", [0xffff_ffff, 0xffff_ffff, 0], 0xffff_fffe_0000_0001),
            ("mad.lo.s32", [0xffff_ffff, 2, 5], 3),
            ("setp.lt.s32", [0xffff_ffff, 0, 0], 1),
            ("setp.lt.u32", [0xffff_ffff, 0, 0], 0),
            ("setp.ne.f32", [nan, nan, 0], 0),
            ("setp.neu.f32", [nan, nan, 0], 1),
            ("setp.leu.f32", [one, 0, 0], 0),
            ("setp.num.f32", [one, nan, 0], 0),
            ("setp.eq.f32", [0, minus_zero, 0], 1),
            ("selp.b32", [3, 4, 1], 3),
            ("selp.b32", [3, 4, 0], 4),
            ("add.rn.f32", [nan, one, 0], 0x7fff_ffff),
            ("mul.rn.f32", [1, one, 0], 1),
            ("max.f32", [nan, minus_zero, 0], minus_zero),
            ("max.f32", [minus_zero, 0, 0], 0),
            ("min.f32", [0, minus_zero, 0], minus_zero),
            ("cvt.f32.f16", [0x0001, 0, 0], 0x3380_0000),
            ("cvt.f32.f16", [0xfc01, 0, 0], 0x7fff_ffff),
            // Half way between two f16, to the even one; and what rounds to more than the largest.
            ("cvt.rn.f16.f32", [0x3f80_1000, 0, 0], 0x3c00),
            ("cvt.rn.f16.f32", [0x3f80_3000, 0, 0], 0x3c02),
            ("cvt.rn.f16.f32", [65519f32.to_bits().into(), 0, 0], 0x7bff),
            ("cvt.rn.f16.f32", [65520f32.to_bits().into(), 0, 0], 0x7c00),
            ("cvt.rn.f16.f32", [0xffc0_0000, 0, 0], 0x7fff),
            ("cvt.rzi.u32.f64", [(-1f64).to_bits(), 0, 0], 0),
            ("cvt.rzi.u32.f64", [1e10f64.to_bits(), 0, 0], 0xffff_ffff),
            ("cvt.rzi.u32.f64", [f64::NAN.to_bits(), 0, 0], 0x8000_0000),
            ("cvt.rpi.f64.f64", [1.25f64.to_bits(), 0, 0], 2f64.to_bits()),
            ("cvt.rn.f64.u64", [u64::MAX, 0, 0], 18_446_744_073_709_551_616f64.to_bits()),
            ("cvt.u16.u32", [0x0001_8000, 0, 0], 0x8000),
            ("neg.s32", [1, 0, 0], 0xffff_ffff),
            ("not.b16", [0x00ff, 0, 0], 0xff00),
        ] {
            assert_eq!(of(opcode, a, b, c), expected, "{opcode} {a:#x}, {b:#x}, {c:#x}");
        }
        for unknown in ["add.ftz.f32", "prmt.b32.f4e", "mul.rz.f32", "add.s32.sat"] {
            assert!(meaning(unknown).is_none(), "{unknown}");
        }
    }
}
