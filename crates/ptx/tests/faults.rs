//! Each thing that no kernel may do is found and named, by kernels written for it; and what is allowed is not.
#![allow(unsafe_code, reason = "launches kernels with addresses")]

use gradprobe_ptx::{Error, FaultKind, Module, Options, memory};

/// A kernel with one parameter, the address of some words, which a body finds in %rd1; %r1 is the thread, %r2 the block.
fn module(body: &str) -> Module {
    let text = format!(
        ".version 9.0\n.target sm_75\n.address_size 64\n.visible .entry kernel(\n.param .u64 words\n)\n{{\n\
         .reg .pred %p<8>;\n.reg .b32 %r<16>;\n.reg .b64 %rd<8>;\n.shared .align 16 .b8 scratch[512];\n\
         ld.param.u64 %rd1, [words];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n{body}\nret;\n}}\n"
    );
    Module::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

const WORDS: usize = 1024;

/// Words that all have a value, lent to a launch.
fn launch(body: &str, blocks: u32, threads: u32, options: Options) -> Result<Vec<u32>, Error> {
    let mut words = vec![0u32; WORDS];
    let address = words.as_mut_ptr() as u64;
    let _lent = memory::lend([(address, 4 * WORDS as u64, true)]);
    let module = module(body);
    // SAFETY: the words live, and nobody else has them.
    unsafe { module.kernel("kernel")?.launch(blocks, threads, &[&address.to_ne_bytes()], options) }?;
    Ok(words)
}

fn seeds() -> impl Iterator<Item = Options> {
    (0..16).map(|seed| Options { seed, ..Options::default() })
}

/// The fault that every seed finds.
#[track_caller]
fn fault(body: &str, blocks: u32, threads: u32) -> FaultKind {
    let mut found = None;
    for options in seeds() {
        let error = launch(body, blocks, threads, options).expect_err("this is wrong");
        let Error::Fault(fault) = error else { panic!("{error}") };
        assert_eq!(fault.kernel, "kernel");
        found = Some(fault.kind);
    }
    found.expect("there are seeds")
}

/// Words in the place of the thread: `[%rd2]`.
const OWN_WORD: &str = "mad.lo.s32 %r3, %r2, 64, %r1;\nmul.wide.u32 %rd3, %r3, 4;\nadd.s64 %rd2, %rd1, %rd3;\n";

/// Thread 0 of a block counts up at `[%rd1]`, and the last block of all goes on to `last`; others leave.
fn last_block(order: &str, fence: &str) -> String {
    format!(
        "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra DONE;\nmul.wide.u32 %rd3, %r2, 4;\nadd.s64 %rd2, %rd1, %rd3;\n\
         add.s32 %r3, %r2, 7;\nst.global.u32 [%rd2+256], %r3;\natom.{order}gpu.global.add.u32 %r4, [%rd1], 1;\n\
         setp.ne.s32 %p2, %r4, 3;\n@%p2 bra DONE;\n{fence}\nst.global.u32 [%rd1], 0;\n\
         ld.global.u32 %r5, [%rd1+256];\nld.global.u32 %r6, [%rd1+260];\nld.global.u32 %r7, [%rd1+264];\n\
         ld.global.u32 %r8, [%rd1+268];\nadd.s32 %r5, %r5, %r6;\nadd.s32 %r7, %r7, %r8;\nadd.s32 %r5, %r5, %r7;\n\
         st.global.u32 [%rd1+512], %r5;\nDONE:\n"
    )
}

#[test]
fn what_a_release_and_an_acquire_order_is_no_race_and_has_one_result() {
    for options in seeds() {
        let words = launch(&last_block("release.", "fence.acq_rel.gpu;"), 4, 32, options).unwrap();
        assert_eq!((words[0], words[128]), (0, 7 + 8 + 9 + 10), "{options:?}");
        let words = launch(&last_block("acq_rel.", ""), 4, 32, options).unwrap();
        assert_eq!((words[0], words[128]), (0, 7 + 8 + 9 + 10), "{options:?}");
    }
}

#[test]
fn without_a_release_or_an_acquire_it_is_a_race_and_has_several_results() {
    for (order, fence) in [("relaxed.", "fence.acq_rel.gpu;"), ("release.", ""), ("release.", "fence.acq_rel.cta;")] {
        let body = last_block(order, fence);
        assert!(matches!(fault(&body, 4, 32), FaultKind::GlobalRace { .. }), "{order}{fence}");
        // The memory shows it as well, to whoever looks at results alone.
        let of_seeds = (0..64).map(|seed| Options { seed, checks_races: false, ..Options::default() });
        let sums: Vec<u32> = of_seeds.map(|options| launch(&body, 4, 32, options).unwrap()[128]).collect();
        assert!(sums.iter().any(|&sum| sum != 34), "{order}{fence}: {sums:?}");
    }
}

#[test]
fn a_release_is_cumulative_over_a_barrier_and_no_further() {
    // Thread 40 writes, thread 0 of its block releases; the other block's thread 0 acquires and thread 40 reads.
    let body = |before: &str, after: &str| {
        format!(
            "setp.ne.s32 %p1, %r1, 40;\nsetp.ne.s32 %p2, %r1, 0;\nsetp.ne.s32 %p3, %r2, 0;\n@%p3 bra WAIT;\n\
             @!%p1 st.global.u32 [%rd1+256], 5;\n{before}\n@%p2 bra DONE;\nfence.acq_rel.gpu;\n\
             atom.global.add.u32 %r3, [%rd1+4], 1;\nbra DONE;\n\
             WAIT:\n@%p2 bra GO;\nLOOP:\natom.global.add.u32 %r3, [%rd1+4], 0;\nsetp.eq.s32 %p4, %r3, 0;\n@%p4 bra LOOP;\n\
             fence.acq_rel.gpu;\nGO:\n{after}\n@%p1 bra DONE;\nld.global.u32 %r4, [%rd1+256];\nst.global.u32 [%rd1+512], %r4;\nDONE:\n"
        )
    };
    for options in seeds() {
        assert_eq!(launch(&body("bar.sync 0;", "bar.sync 0;"), 2, 64, options).unwrap()[128], 5);
    }
    assert!(matches!(fault(&body("", "bar.sync 0;"), 2, 64), FaultKind::GlobalRace { .. }));
    assert!(matches!(fault(&body("bar.sync 0;", ""), 2, 64), FaultKind::GlobalRace { .. }));
}

#[test]
fn accesses_to_memory_are_checked() {
    type Expected = fn(&FaultKind) -> bool;
    let cases: [(&str, Expected); 16] = [
        ("mov.u64 %rd2, 0;\nld.global.u32 %r3, [%rd2+-4];", |kind| matches!(kind, FaultKind::OutOfBounds { .. })),
        ("mov.u64 %rd2, -4;\nst.global.u64 [%rd2+4], %rd2;", |kind| matches!(kind, FaultKind::OutOfBounds { .. })),
        ("cvta.shared.u64 %rd2, 0;\nst.shared.u32 [%rd2], 1;", |kind| matches!(kind, FaultKind::OutOfBounds { .. })),
        ("atom.cta.global.add.u32 %r3, [%rd1], 1;", |kind| matches!(kind, FaultKind::GlobalRace { .. })),
        ("ld.global.u32 %r3, [%rd1+4096];", |kind| matches!(kind, FaultKind::OutOfBounds { bytes: 4, .. })),
        ("ld.global.nc.v4.u32 {%r3, %r4, %r5, %r6}, [%rd1+-16];", |kind| {
            matches!(kind, FaultKind::OutOfBounds { bytes: 16, .. })
        }),
        ("prefetch.global.L2 [%rd1+4096];", |kind| matches!(kind, FaultKind::OutOfBounds { .. })),
        ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd1+8];", |kind| {
            matches!(kind, FaultKind::Misaligned { bytes: 16, .. })
        }),
        ("st.global.u32 [%rd1+2], 1;", |kind| matches!(kind, FaultKind::Misaligned { bytes: 4, .. })),
        ("ld.shared.u32 %r3, [scratch+512];", |kind| matches!(kind, FaultKind::OutOfBounds { .. })),
        ("ld.shared.u32 %r3, [scratch];", |kind| matches!(kind, FaultKind::Uninitialised { bytes: 4, .. })),
        ("atom.shared.add.u32 %r3, [scratch], 1;", |kind| matches!(kind, FaultKind::Uninitialised { .. })),
        ("add.s32 %r3, %r4, 1;", |kind| *kind == FaultKind::UninitialisedRegister { name: "%r4".to_owned() }),
        ("ld.param.u64 %rd3, [words+8];", |kind| matches!(kind, FaultKind::OutOfBounds { address: 8, .. })),
        ("st.global.u32 [%rd1], %r1;", |kind| matches!(kind, FaultKind::GlobalRace { .. })),
        ("ld.global.nc.u32 %r3, [%rd1];\nsetp.ne.s32 %p1, %r1, 0;\n@!%p1 st.global.u32 [%rd1], 1;", |kind| {
            matches!(kind, FaultKind::ReadOnlyWritten { .. })
        }),
    ];
    for (body, is_expected) in cases {
        let kind = fault(body, 2, 32);
        assert!(is_expected(&kind), "{body}: {kind}");
    }
}

#[test]
fn memory_has_no_value_before_it_is_written() {
    let mut words = vec![1u32; 64];
    let address = words.as_mut_ptr() as u64;
    let module = module("ld.global.u32 %r3, [%rd1];\nst.global.u32 [%rd1+4], %r3;");
    let kernel = module.kernel("kernel").unwrap();
    // SAFETY: the words live, and nobody else has them.
    let run = || unsafe { kernel.launch(1, 1, &[&address.to_ne_bytes()], Options::default()) };
    memory::allocated(address, 256);
    let error = run().unwrap_err().to_string();
    assert!(error.contains("uninitialised: 4 bytes") && error.contains("line 15, block 0, thread 0"), "{error}");
    memory::written(address, 4);
    run().unwrap();
    memory::freed(address);
    assert!(run().unwrap_err().to_string().contains("in no allocation"));
    let _lent = memory::lend([(address, 256, false)]);
    assert!(run().unwrap_err().to_string().contains("lent for reading"));
    assert_eq!(words[..3], [1, 1, 1]);
}

#[test]
fn races_in_shared_memory_are_found() {
    let neighbour = |barrier: &str| {
        format!(
            "mov.u32 %r3, scratch;\nmad.lo.s32 %r4, %r1, 4, %r3;\nst.shared.u32 [%r4], %r1;\n{barrier}\n\
             xor.b32 %r5, %r1, 1;\nmad.lo.s32 %r6, %r5, 4, %r3;\nld.shared.u32 %r7, [%r6];\n{OWN_WORD}st.global.u32 [%rd2], %r7;"
        )
    };
    // Without a barrier even the lanes of one warp race, or read what has no value yet.
    for _ in 0..2 {
        let kind = fault(&neighbour(""), 1, 64);
        assert!(matches!(kind, FaultKind::SharedRace { .. } | FaultKind::Uninitialised { .. }), "{kind}");
    }
    for options in seeds() {
        let words = launch(&neighbour("bar.sync 0;"), 1, 64, options).unwrap();
        assert_eq!(words[..4], [1, 0, 3, 2]);
        let counted = "setp.ne.s32 %p1, %r1, 0;\n@!%p1 st.shared.u32 [scratch], 0;\nbar.sync 0;\n\
                       atom.shared.add.u32 %r3, [scratch], 2;\nbar.sync 0;\n@%p1 bra DONE;\nld.shared.u32 %r4, [scratch];\n\
                       st.global.u32 [%rd1], %r4;\nDONE:";
        assert_eq!(launch(counted, 1, 96, options).unwrap()[0], 192);
        let raced = counted.replace("2;\nbar.sync 0;", "2;");
        assert!(launch(&raced, 1, 96, options).is_err());
    }
}

#[test]
fn barriers_and_shuffles_count_their_threads() {
    let waits = |kind: FaultKind| if let FaultKind::Divergent { waits } = kind { waits } else { panic!("{kind}") };
    let lower = "setp.lt.s32 %p1, %r1, 40;\n";
    let found = waits(fault(&format!("{lower}@%p1 bar.sync 0;"), 1, 64));
    assert!(found.contains("wait at the barrier in line 16"), "{found}");
    let found = waits(fault(&format!("{lower}@!%p1 bra DONE;\nbar.sync 0;\nDONE:"), 1, 96));
    assert!(found.contains("have ended"), "{found}");
    // Two warps may come to two instructions of one barrier, but the lanes of one warp may not (PTX ISA, "barrier").
    let two = |limit: u32| {
        format!("setp.lt.s32 %p1, %r1, {limit};\n@%p1 bra A;\nbar.sync 0;\nbra DONE;\nA:\nbar.sync 0;\nDONE:")
    };
    for options in seeds() {
        launch(&two(32), 1, 64, options).unwrap();
    }
    waits(fault(&two(16), 1, 32));

    // The lanes of a warp meet wherever they come from, but all that are named.
    let meets = "setp.lt.s32 %p1, %r1, 16;\n@%p1 bra A;\nmov.u32 %r9, 1;\nA:\nbar.warp.sync -1;\n";
    for options in seeds() {
        launch(meets, 1, 32, options).unwrap();
    }
    assert!(matches!(fault("bar.warp.sync 65535;", 1, 32), FaultKind::Shuffle { .. }));
    waits(fault("setp.lt.s32 %p1, %r1, 16;\n@%p1 bra A;\nbar.warp.sync -1;\nbra DONE;\nA:\nbar.sync 0;\nDONE:", 1, 32));

    let shuffle = |members: &str| {
        format!("shfl.sync.down.b32 %r9|%p2, %r1, 1, 31, {members};\n{OWN_WORD}st.global.u32 [%rd2], %r9;")
    };
    for options in seeds() {
        let words = launch(&shuffle("-1"), 1, 32, options).unwrap();
        assert_eq!((words[0], words[30], words[31]), (1, 31, 31));
    }
    assert!(matches!(fault(&shuffle("65535"), 1, 32), FaultKind::Shuffle { .. }));
    waits(fault(
        &format!(
            "setp.lt.s32 %p1, %r1, 16;\n@!%p1 bra OTHER;\n{}\nbra DONE;\nOTHER:\nbar.sync 0;\nDONE:",
            shuffle("-1")
        ),
        1,
        32,
    ));
    let after_end = format!("setp.lt.s32 %p1, %r1, 16;\n@%p1 bra DONE;\n{}\nDONE:", shuffle("-1"));
    assert!(matches!(fault(&after_end, 1, 32), FaultKind::Shuffle { .. } | FaultKind::Divergent { .. }));
}

#[test]
fn counters_are_set_back_and_launches_end() {
    let body = last_block("release.", "fence.acq_rel.gpu;").replace("st.global.u32 [%rd1], 0;", "");
    assert!(matches!(fault(&body, 4, 32), FaultKind::Counter { before: 0, after: 4, .. }));
    let limited = Options { limit: 10_000, ..Options::default() };
    for body in
        ["LOOP:\nbra LOOP;", "LOOP:\natom.global.add.u32 %r3, [%rd1], 0;\nsetp.eq.s32 %p1, %r3, 0;\n@%p1 bra LOOP;"]
    {
        let Err(Error::Fault(fault)) = launch(body, 2, 32, limited) else { panic!("it ended") };
        let said = fault.to_string();
        assert!(said.contains("it does not end: after 1") && said.contains("32 threads are at line"), "{said}");
    }
}

/// As in CUDA's sample of `__threadfence`: the last to count sets the counter back by a plain store.
#[test]
fn a_fence_and_a_relaxed_counter_order_as_well() {
    for options in seeds() {
        for order in ["", "relaxed."] {
            let body = last_block(order, "fence.acq_rel.gpu;").replace("atom.", "membar.gl;\natom.");
            let words = launch(&body, 4, 32, options).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((words[0], words[128]), (0, 7 + 8 + 9 + 10), "{options:?}");
        }
    }
}

/// Who waits for a lane of its own warp gets there: each lane makes progress.
#[test]
fn lanes_of_a_warp_may_wait_for_one_another() {
    let body = "setp.eq.s32 %p1, %r1, 7;\n@%p1 bra SET;\nLOOP:\natom.global.add.u32 %r3, [%rd1], 0;\nsetp.eq.s32 %p2, %r3, 0;\n\
                @%p2 bra LOOP;\nbra DONE;\nSET:\natom.global.add.u32 %r3, [%rd1], 1;\nDONE:";
    for options in seeds() {
        assert_eq!(launch(body, 1, 32, Options { limit: 1 << 20, ..options }).unwrap()[0], 1);
    }
}

#[test]
fn literals_are_as_wide_as_their_operand() {
    let body = "mov.pred %p1, -1;\nnot.pred %p2, %p1;\nselp.b32 %r3, 7, 8, %p2;\nst.global.u32 [%rd1], %r3;\n\
                mov.u32 %r4, 3;\nmad.wide.s32 %rd2, %r4, 4, -13;\nst.global.u64 [%rd1+8], %rd2;\n\
                shl.b32 %r5, %r4, 65537;\nst.global.u32 [%rd1+16], %r5;\nadd.s32 %r6, %r4, -4;\nst.global.u32 [%rd1+20], %r6;";
    let words = launch(body, 1, 1, Options::default()).unwrap();
    assert_eq!(words[..6], [8, 0, u32::MAX, u32::MAX, 0, u32::MAX]);
}

#[test]
fn functions_are_put_in_where_they_are_called() {
    let text = ".version 9.0\n.func (.param .b32 result) twice(.param .b32 of)\n{\n.reg .b32 %r<3>;\n.reg .pred %p<2>;\n\
                ld.param.u32 %r1, [of];\nsetp.eq.s32 %p1, %r1, 5;\n@%p1 bra end;\nadd.s32 %r1, %r1, %r1;\nend:\n\
                st.param.b32 [result+0], %r1;\nret;\n}\n\
                .visible .entry kernel(.param .u64 words)\n{\n.reg .b32 %r<4>;\n.reg .b64 %rd<2>;\n.reg .pred %p<2>;\n\
                ld.param.u64 %rd1, [words];\nmov.u32 %r1, %tid.x;\n\
                { .param .b32 a; st.param.b32 [a+0], %r1; .param .b32 b; CALL (b), twice, (a); ld.param.b32 %r2, [b+0]; }\n\
                mad.lo.s32 %r3, %r1, 4, 0;\ncvt.u64.u32 %rd0, %r3;\nadd.s64 %rd1, %rd1, %rd0;\nst.global.u32 [%rd1], %r2;\nret;\n}\n";
    let mut words = [0u32; 8];
    let address = words.as_mut_ptr() as u64;
    let _lent = memory::lend([(address, 32, true)]);
    let module = Module::parse(&text.replace("CALL", "call.uni")).unwrap();
    // SAFETY: the words live, and nobody else has them.
    unsafe { module.kernel("kernel").unwrap().launch(1, 8, &[&address.to_ne_bytes()], Options::default()) }.unwrap();
    assert_eq!(words, [0, 2, 4, 6, 8, 5, 12, 14]);
    let guarded = Module::parse(&text.replace("CALL", "@%p1 call.uni")).unwrap_err();
    assert!(guarded.what.contains("with a guard"), "{guarded}");
}

#[test]
fn what_is_lent_is_lent_until_it_is_given_back() {
    let words = [1u32; 64];
    let address = words.as_ptr() as u64;
    let module = module("ld.global.u32 %r3, [%rd1];\nld.global.u32 %r3, [%rd1+128];");
    let kernel = module.kernel("kernel").unwrap();
    // SAFETY: the words live, and are read.
    let run = || unsafe { kernel.launch(1, 1, &[&address.to_ne_bytes()], Options::default()) };
    let (first, second) = (memory::lend([(address, 128, false)]), memory::lend([(address + 128, 128, false)]));
    run().unwrap();
    drop(first);
    run().unwrap_err();
    let _first = memory::lend([(address, 128, false)]);
    run().unwrap();
    drop(second);
    run().unwrap_err();
}

#[test]
fn bad_input_is_one_clear_error() {
    let good = "ld.param.u64 %rd2, [words];";
    module(good);
    for (text, line, what) in [
        ("", 1, "no `.version`"),
        ("hello", 1, "`hello`"),
        (".version 9.0\n.address_size 32", 2, "64 bits"),
        (".version 9.0\n.entry k()\n{\ncall.uni nothing, ();\n}", 4, "not there"),
        (".version 9.0\n.visible .entry k(\n.param .u64 p\n) {", 4, "ends"),
        (".version 9.0\n.entry k()\n{\n.local .b8 x[4];\nret;\n}", 4, "`.local`"),
        (
            ".version 9.0\n.entry k()\n{\n.reg .f32 %f<3>;\nadd.rz.f32 %f0, %f1, %f2;\n}",
            5,
            "`add.rz.f32` is not understood",
        ),
        (".version 9.0\n.entry k()\n{\n.reg .b32 %r<3>;\nadd.s32 %r0, %r1;\n}", 5, "`add.s32` is not understood"),
        (
            ".version 9.0\n.entry k()\n{\n.reg .b32 %r<3>;\nld.tex.u32 %r0, [%r1];\n}",
            5,
            "`ld.tex.u32` is not understood",
        ),
        (".version 9.0\n.entry k()\n{\nbra NOWHERE;\n}", 4, "no label NOWHERE"),
        (".version 9.0\n.entry k()\n{\n@%p9 ret;\n}", 4, "unknown name"),
        (".version 9.0\n.entry k()\n{\n.reg .b32 %r<2>;\n.reg .b32 %r<2>;\nret;\n}", 5, "twice"),
        (".version 9.0\n.entry k()\n{\n.reg .b32 %r<4000000000>;\nret;\n}", 4, "registers"),
        (".version 9.0\n.entry k()\n{\nA:\nbra A;\nA:\nret;\n}", 6, "twice"),
        (".version 9.0\n.entry k()\n{\n.reg .b64 %r<3>;\nmov.b64 %r1, {};\nret;\n}", 5, "`mov.b64` is not understood"),
        (
            ".version 9.0\n.entry k()\n{\n.reg .b32 %r<3>;\nmov.b32 %r1, {%r0, %r0, %r0};\nret;\n}",
            5,
            "`mov.b32` is not",
        ),
        (".version 9.0\n.entry k()\n{\n.reg .b32 %r<3>;\nadd.s32 %r0 %r1 %r2;\nret;\n}", 5, "`,` is missing"),
        (
            ".version 9.0\n.entry k()\n{\n.reg .b32 %r<3>;\nadd.s32 %r0, %r1, 010;\nret;\n}",
            5,
            "`add.s32` is not understood",
        ),
        (".version 9.0\n.entry k()\n{\n.reg .b64 %r<3>;\natom.add. %r0, [%r1], 1;\nret;\n}", 5, "is not understood"),
        (".version 9.0\n.entry k()\n{\n.reg .b64 %r<3>;\nst.global.u8 [%r1], 1;\nret;\n}", 5, "is not understood"),
        (".version 9.0\n.entry k()\n{\nret.now;\n}", 4, "`ret.now` is not understood"),
        (".version 9.0\n.entry k()\n{\n.shared .b8 x[1099511627776];\nret;\n}", 4, "1099511627776 bytes"),
        (".version 9.0\n.entry k(.param .align 3 .b8 x[4])\n{\nret;\n}", 2, "power of two"),
        (".version 9.0\n.entry k()\n{\n@%p1 .reg .b32 %r1;\nret;\n}", 4, "with a guard"),
        (".version 9.0 /* ", 1, "a comment without an end"),
    ] {
        let error = Module::parse(text).expect_err(text);
        assert!(error.line == line && error.what.contains(what), "{text:?}: {error}");
        assert!(!error.to_string().contains('\n'));
    }
    let module = module(good);
    let error = module.kernel("colonel").unwrap_err().to_string();
    assert_eq!(error, "there is no kernel \"colonel\" in the PTX, which has kernel");
    let kernel = module.kernel("kernel").unwrap();
    // SAFETY: refused.
    let error = unsafe { kernel.launch(1, 32, &[&[0; 4]], Options::default()) }.unwrap_err();
    assert_eq!(error.to_string(), "kernel takes parameters of [8] bytes, not [4]");
    // SAFETY: refused.
    let error = unsafe { kernel.launch(1, 0, &[&[0; 8]], Options::default()) }.unwrap_err();
    assert!(error.to_string().contains("cannot run with 0 threads"), "{error}");
}

#[test]
fn fat_binaries_that_are_none_are_refused() {
    use gradprobe_ptx::fatbin::ptx;
    let header = |entries: &[u8]| {
        [&0xba55_ed50u32.to_le_bytes()[..], &[1, 0, 16, 0], &(entries.len() as u64).to_le_bytes(), entries].concat()
    };
    assert_eq!(ptx(b"hello, world, hello").unwrap_err(), "this is no fat binary");
    assert_eq!(ptx(&header(&[])).unwrap_err(), "the fat binary has no PTX");
    assert_eq!(ptx(&header(&[1, 0, 1, 1])).unwrap_err(), "the fat binary is cut off");
    assert_eq!(ptx(&header(&[0; 64])).unwrap_err(), "the fat binary is cut off");
    assert_eq!(gradprobe_ptx::fatbin::length(&[0xff; 16]), usize::MAX);
}
