//! The product by the tiles of AMX: sixteen rows by 32 numbers of bf16, times as many by sixteen columns, in one instruction.
//!
//! A panel has its words as the instruction wants them: sixteen words of the depth by sixteen columns are a tile, rows of
//! a line of the cache each. Two tiles of rows by two of columns share the eight registers: each that is loaded is multiplied
//! twice. Loads of lines that cross a border take six times as long, measured, so that rows are copied if they do.
//!
//! Rust has no stable intrinsics for AMX; the instructions are written out.

use std::arch::asm;

use burn::tensor::bf16;

use super::number::has_bf16;
use super::product::{Engine, Tile};
use super::simd::{Avx512, LANES};

/// Rows of a tile.
const HEIGHT: usize = 16;
/// Elements of a tile's depth.
const DEPTH: usize = 32;
/// Bytes of a tile's row.
const BYTES: usize = 64;

/// `tdpbf16ps`.
pub(super) struct Tiles {
    /// For how many rows the registers are set up; none at first.
    rows: usize,
}

/// How the eight registers are shaped: the operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Sums in registers 0 to 3, rows in 4 and 5, columns in 6 and 7. What is of the second tile of rows, 2, 3 and 5, is not
    /// used if there is none.
    fn of(rows: usize) -> Self {
        let first = rows.min(HEIGHT) as u8;
        let second = rows.saturating_sub(HEIGHT).max(1) as u8;
        let mut shapes = Self { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        shapes.bytes[..8].fill(BYTES as u16);
        shapes.rows[..8].copy_from_slice(&[first, first, second, second, first, second, 16, 16]);
        shapes
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.rows > 0 {
            // registers in their first state cost a change of threads nothing
            // SAFETY: the processor has it, or `multiply` was not to be called.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
        }
    }
}

/// Multiplies along the depth: `$zero` or `$load` sums, `$step` for each 32 elements, `$store` sums.
///
/// `{a}` and `{a2}` are the two tiles of rows, `{b}` the panel, `{c}` and `{c2}` the sums, all with their steps in bytes.
macro_rules! sweep {
    ($sweep:expr, $zero:literal, $load:literal, $step:literal, $store:literal) => {{
        let Sweep { a, a_step, b, b_step, c, c_step, steps, accumulate } = $sweep;
        asm!(
            "test {accumulate}, {accumulate}",
            "jnz 2f",
            $zero,
            "jmp 3f",
            "2:",
            $load,
            "3:",
            $step,
            "add {a}, 64",
            "add {a2}, 64",
            "add {b}, {b_next}",
            "dec {steps}",
            "jnz 3b",
            $store,
            "/* {c2}: of the second tile of rows, where there is one */",
            a = inout(reg) a => _,
            a2 = inout(reg) a.wrapping_byte_add(HEIGHT * a_step) => _,
            a_step = in(reg) a_step,
            b = inout(reg) b => _,
            b_step = in(reg) b_step,
            b_next = in(reg) LANES * b_step,
            c = in(reg) c,
            c2 = in(reg) c.wrapping_byte_add(HEIGHT * c_step),
            c_step = in(reg) c_step,
            steps = inout(reg) steps => _,
            accumulate = in(reg) usize::from(accumulate),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }};
}

/// The operands of a [`sweep`], steps in bytes.
#[derive(Clone, Copy)]
struct Sweep {
    a: *const bf16,
    a_step: usize,
    b: *const u8,
    b_step: usize,
    c: *mut f32,
    c_step: usize,
    steps: usize,
    accumulate: bool,
}

impl Sweep {
    /// Two tiles of rows by two of columns.
    ///
    /// # Safety
    /// The registers must be set up for more than one tile of rows, and all that is named be there.
    unsafe fn two_by_two(self) {
        // SAFETY: the caller's word.
        unsafe {
            sweep!(
                self,
                "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3",
                "tileloadd tmm0, [{c} + {c_step}]\ntileloadd tmm1, [{c} + {c_step} + 64]\n\
                 tileloadd tmm2, [{c2} + {c_step}]\ntileloadd tmm3, [{c2} + {c_step} + 64]",
                "tileloadd tmm4, [{a} + {a_step}]\ntileloadd tmm6, [{b} + {b_step}]\ntdpbf16ps tmm0, tmm4, tmm6\n\
                 tileloadd tmm7, [{b} + {b_step} + 64]\ntdpbf16ps tmm1, tmm4, tmm7\n\
                 tileloadd tmm5, [{a2} + {a_step}]\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7",
                "tilestored [{c} + {c_step}], tmm0\ntilestored [{c} + {c_step} + 64], tmm1\n\
                 tilestored [{c2} + {c_step}], tmm2\ntilestored [{c2} + {c_step} + 64], tmm3"
            );
        }
    }

    /// Two tiles of rows by one of columns.
    ///
    /// # Safety
    /// As [`two_by_two`](Self::two_by_two).
    unsafe fn two_by_one(self) {
        // SAFETY: the caller's word.
        unsafe {
            sweep!(
                self,
                "tilezero tmm0\ntilezero tmm2",
                "tileloadd tmm0, [{c} + {c_step}]\ntileloadd tmm2, [{c2} + {c_step}]",
                "tileloadd tmm4, [{a} + {a_step}]\ntileloadd tmm6, [{b} + {b_step}]\ntdpbf16ps tmm0, tmm4, tmm6\n\
                 tileloadd tmm5, [{a2} + {a_step}]\ntdpbf16ps tmm2, tmm5, tmm6",
                "tilestored [{c} + {c_step}], tmm0\ntilestored [{c2} + {c_step}], tmm2"
            );
        }
    }

    /// One tile of rows by two of columns.
    ///
    /// # Safety
    /// The registers must be set up, and all that is named be there.
    unsafe fn one_by_two(self) {
        // SAFETY: the caller's word.
        unsafe {
            sweep!(
                self,
                "tilezero tmm0\ntilezero tmm1",
                "tileloadd tmm0, [{c} + {c_step}]\ntileloadd tmm1, [{c} + {c_step} + 64]",
                "tileloadd tmm4, [{a} + {a_step}]\ntileloadd tmm6, [{b} + {b_step}]\ntdpbf16ps tmm0, tmm4, tmm6\n\
                 tileloadd tmm7, [{b} + {b_step} + 64]\ntdpbf16ps tmm1, tmm4, tmm7",
                "tilestored [{c} + {c_step}], tmm0\ntilestored [{c} + {c_step} + 64], tmm1"
            );
        }
    }

    /// One tile by one.
    ///
    /// # Safety
    /// As [`one_by_two`](Self::one_by_two).
    unsafe fn one_by_one(self) {
        // SAFETY: the caller's word.
        unsafe {
            sweep!(
                self,
                "tilezero tmm0",
                "tileloadd tmm0, [{c} + {c_step}]",
                "tileloadd tmm4, [{a} + {a_step}]\ntileloadd tmm6, [{b} + {b_step}]\ntdpbf16ps tmm0, tmm4, tmm6",
                "tilestored [{c} + {c_step}], tmm0"
            );
        }
    }
}

impl Engine for Tiles {
    type Number = bf16;
    type Simd = Avx512;
    const ROWS: usize = 2 * HEIGHT;
    const ROWS_IN_LINES: bool = true;
    const SUMS: usize = 128 * 1024;
    const PACKS_ONCE: bool = true;

    fn is_available() -> bool {
        is_available()
    }

    fn begin() -> Self {
        Self { rows: 0 }
    }

    unsafe fn multiply(&mut self, tile: Tile<bf16>, rows: usize, vectors: usize) {
        for row in (0..rows).step_by(Self::ROWS) {
            let (tile, rows) = (tile.at_row(row), Self::ROWS.min(rows - row));
            if self.rows != rows {
                let shapes = Shapes::of(rows);
                // SAFETY: the processor has it, says the caller, and these are shapes that it allows.
                unsafe {
                    asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly, preserves_flags))
                };
                self.rows = rows;
            }
            for v in (0..vectors).step_by(2) {
                let sweep = Sweep {
                    a: tile.rows.from,
                    a_step: tile.rows.step * size_of::<bf16>(),
                    b: tile.panel.wrapping_add(v).cast(),
                    b_step: vectors * BYTES,
                    c: tile.sums.wrapping_add(v * LANES),
                    c_step: tile.step * size_of::<f32>(),
                    steps: tile.depth.div_ceil(DEPTH),
                    accumulate: tile.accumulate,
                };
                // SAFETY: so many rows and vectors are there, as far as `DEPTH` goes, says the caller; the depth is not 0.
                unsafe {
                    match (rows > HEIGHT, vectors - v > 1) {
                        (true, true) => sweep.two_by_two(),
                        (true, false) => sweep.two_by_one(),
                        (false, true) => sweep.one_by_two(),
                        (false, false) => sweep.one_by_one(),
                    }
                }
            }
        }
    }
}

/// Whether this processor multiplies by tiles.
pub(super) fn is_available() -> bool {
    has_bf16() && permitted()
}

/// Whether the processor has AMX for bf16 and the system lets this process use it, which is asked for once.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::LazyLock;

    /// `ARCH_REQ_XCOMP_PERM`
    const REQUEST: libc::c_int = 0x1023;
    /// `XFEATURE_XTILEDATA`
    const TILE_DATA: libc::c_ulong = 18;
    /// Of `edx` in leaf 7: `AMX-BF16` and `AMX-TILE`.
    const FEATURES: u32 = 1 << 22 | 1 << 24;

    static PERMITTED: LazyLock<bool> = LazyLock::new(|| {
        // SAFETY: every processor of this architecture has it.
        #[allow(unused_unsafe, reason = "it was unsafe before Rust 1.95")]
        let has_it = unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES };
        // SAFETY: this request changes nothing but what the process may use.
        has_it && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0
    });
    *PERMITTED
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
