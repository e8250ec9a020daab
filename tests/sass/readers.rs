//! That listings are read as they are meant.

use crate::{
    dump::{Usage, parse_usage, section},
    listing::{Cost, Instruction, Listing, lies_in},
};

/// Two small kernels as `cuobjdump` prints them, with every form the tests above look for.
const SAMPLE: &str = "\
\tcode for sm_90
\t\tFunction : other
        /*0000*/                   STL [R1], R2 ;                        /* 0x0000000000017387 */
                                                                         /* 0x000fe20000100800 */
        /*0010*/                   EXIT ;                                /* 0x000000000000794d */
\t\tFunction : sample
\t.headerflags\t@\"EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x200] ;
        /*0030*/                   LDG.E.U16 R20, desc[UR4][R2.64+0x400] ;
        /*0040*/                   FADD R16, |R7|, -R16.reuse ;
        /*0050*/                   LDG.E.128.CONSTANT R12, desc[UR8][R2.64+0x400] ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/              @!P1 BRA P2, 0x10 ;
        /*0080*/                   F2F.F64.F32 R4, R8 ;
        /*0090*/               @P0 DADD R4, R4, R6 ;
        /*00a0*/               @P0 BRA 0xd0 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   DMUL R4, R4, R6 ;
        /*00d0*/                   BRA.DIV UR5, 0x110 ;
        /*00e0*/                   MUFU.RCP64H R5, R5 ;
        /*00f0*/               @P3 BRA 0x0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   DADD R4, R4, R6 ;
        /*0120*/                   BRA 0xe0 ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
        /*0150*/                   PRMT R6, R4, 0xfdb9, R5 ;
        /*0160*/                   PRMT R6, R4, R7, R5 ;
";

#[test]
fn listings_are_read() {
    let code = Listing::of("sample", SAMPLE);
    let addresses: Vec<u64> = code.instructions().iter().map(|instruction| instruction.address).collect();
    assert_eq!(addresses, (0..=0x16).map(|index| index * 0x10).collect::<Vec<_>>());
    assert_eq!(code.instructions()[1].opcode, "LDG.E.128.CONSTANT");
    assert_eq!(Listing::of("other", SAMPLE).instructions().len(), 2, "a kernel ends where the next begins");
    assert_eq!(Listing::of("none", SAMPLE).instructions().len(), 0);

    let all = 0..addresses.len();
    assert_eq!(code.count(&all, Instruction::is_load), 4);
    assert_eq!(code.count(&all, Instruction::is_vector_load), 3);
    assert_eq!(code.count(&all, Instruction::is_fp64), 5, "F2F.F64, DADD, DMUL, MUFU.RCP64H, DADD");
    assert_eq!(code.count(&all, |instruction| instruction.is("LD")), 0, "LDG is no LD");
    let selectors: Vec<u32> = code.instructions().iter().filter_map(|code| code.byte_selector()).collect();
    assert_eq!(selectors, [0xfdb9], "one is a register");
}

#[test]
fn loops_are_those_that_a_branch_back_closes() {
    let code = Listing::of("sample", SAMPLE);
    // Of the two that start at 0x10, the longer; a branch to itself, which only pads, is none.
    assert_eq!(code.loops(), [0x1..0x8, 0x0..0x10, 0xe..0x13]);
    assert_eq!(code.outermost(|_| true), [0x0..0x10, 0xe..0x13]);
    assert_eq!(code.outermost(|span| span.len() < 0x10), [0x1..0x8, 0xe..0x13]);
    assert!(lies_in(&(1..8), &(0..16)) && !lies_in(&(0..16), &(0..16)) && !lies_in(&(14..19), &(0..16)));
    // The third load comes after the use of what the first has brought.
    assert_eq!(code.loads_in_flight(&(0x1..0x8)), 2);
    assert_eq!(code.loads_in_flight(&(0x5..0x8)), 1);
    assert_eq!(code.once_round(&(0x1..0x8), Instruction::is_vector_load, |_| false), Some(7));
    assert_eq!(code.once_round(&(0x1..0x8), Instruction::is_vector_load, |load| load.is("LDG.U16")), None);
}

#[test]
fn straight_paths_pass_the_fewest_barriers() {
    let code = Listing::of("sample", SAMPLE);
    // Around the barrier and DMUL, and not into what lies behind BRA.DIV.
    let around = Cost { least_fp64: 2, most_fp64: 3, ..Cost::default() };
    assert_eq!(code.straight_path(0x8, 0xf), Some(around));
    assert_eq!(
        code.straight_path(0xb, 0xd),
        Some(Cost { barriers: 1, least_fp64: 1, most_fp64: 1, ..Cost::default() })
    );
    assert_eq!(code.straight_path(0xf, 0x12), None, "EXIT");
}

/// A block that counts its chunk, a fold of which two steps divide, and a jump by a table.
const FOLD: &str = "\
\tcode for sm_75
\t\tFunction : fold
        /*0000*/                   MEMBAR.SC.CTA ;
        /*0010*/               @P0 BRA 0xa0 ;
        /*0020*/                   MEMBAR.ALL.GPU ;
        /*0030*/                   ERRBAR ;
        /*0040*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, [R4], R6 ;
        /*0050*/               @P1 BRA 0xa0 ;
        /*0060*/                   MEMBAR.ALL.GPU ;
        /*0070*/                   ERRBAR ;
        /*0080*/                   CCTL.IVALL ;
        /*0090*/                   STG.E.SYS [R4], RZ ;
        /*00a0*/                   I2F.U32.RP R5, R4 ;
        /*00b0*/                   BAR.SYNC 0x0 ;
        /*00c0*/                   CALL.REL.NOINC 0x150 ;
        /*00d0*/                   CALL.REL.NOINC 0x170 ;
        /*00e0*/                   I2F.U32.RP R5, R4 ;
        /*00f0*/                   UI2F.U32.RP UR5, UR4 ;
        /*0100*/                   I2F.U32 R5, R4 ;
        /*0110*/               @P2 BRA 0xb0 ;
        /*0120*/              @!P3 BRA 0x0 ;
        /*0130*/                   BRX R4 -0x140 ;
        /*0140*/                   EXIT ;
        /*0150*/                   I2F.U64.RP R5, R4 ;
        /*0160*/                   RET.REL.NODEC R2 0x0 ;
        /*0170*/                   I2F.F64.U64 R6, R4 ;
        /*0180*/                   RET.REL.NODEC R2 0x0 ;
        /*0190*/                   ATOMS.ADD RZ, [R4], R6 ;
        /*01a0*/                   ATOMS.ADD R2, [R4], R6 ;
\tcode for sm_80
\t\tFunction : fold
        /*0000*/                   BRA.DIV 0x30 ;
        /*0010*/                   I2F.U64.RP R5, R4 ;
        /*0020*/                   EXIT ;
        /*0030*/                   CALL.REL.NOINC 0x10 ;
";

#[test]
fn an_architecture_ends_where_the_next_begins() {
    assert_eq!(Listing::of("fold", section(75, FOLD)).instructions().len(), 27);
    assert_eq!(Listing::of("fold", section(80, FOLD)).instructions().len(), 4);
}

#[test]
fn fences_are_those_of_paths_that_acquire_least() {
    let code = Listing::of("fold", section(75, FOLD));
    // Around the fence that acquires, and through the other; that of a block is none.
    let cost = Cost { most_fences: 1, most_error_barriers: 1, ..Cost::default() };
    assert_eq!(code.straight_path(0x0, 0xa), Some(cost));
    // There is no way around.
    let cost = Cost { acquires: 1, least_fences: 1, ..cost };
    assert_eq!(code.straight_path(0x6, 0xa), Some(cost));
}

#[test]
fn divisions_are_counted_in_the_steps_of_folds() {
    let code = Listing::of("fold", section(75, FOLD));
    assert_eq!(code.loops(), [0xb..0x12, 0x0..0x13]);
    let steps = 0xb..0x12;
    assert_eq!(code.loops_by_barriers(), std::slice::from_ref(&steps));
    // By their 32 bits; one of them calls that of 64 as well, and to a float is no division, nor what else is called.
    assert_eq!(code.divisions(&steps), 2);
    assert_eq!(code.divisions(&(0xb..0xe)), 1, "without one of 32 bits beside it");
    assert_eq!(code.divisions(&(0x0..0x1b)), 3);
    assert_eq!(code.divisions(&(0x15..0x17)), 0, "a function is counted where it is called");
    let in_place = Listing::of("fold", section(80, FOLD));
    assert_eq!(in_place.divisions(&(0x0..0x4)), 1, "of 64 bits, and called as a way back");
    assert_eq!(in_place.straight_path(0x0, 0x2), Some(Cost::default()), "BRA.DIV goes on where no lane is lost");
    let kinds = |index: usize| code.instructions()[index].has_no_result();
    assert!(kinds(0x19) && !kinds(0x1a));
}

#[test]
#[should_panic(expected = "0x130: where this jumps is not known")]
fn no_path_goes_through_a_jump_by_a_table() {
    Listing::of("fold", section(75, FOLD)).straight_path(0x12, 0x14);
}

#[test]
fn resource_usage_is_read() {
    let output = "
Fatbin ptx code:
================
arch = sm_75
code version = [9,0]

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function gradprobe_measure:
  REG:126 STACK:8 SHARED:14952 LOCAL:16 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
";
    let usage = Usage { registers: 126, stack: 8, shared: 14_952, local: 16 };
    assert_eq!(parse_usage(output), [(90, "gradprobe_measure".to_owned(), usage)]);
}
