//! The numeric contract of quantised products: every output has the bits of a chain per span of 256 weights, spans added
//! in order, whatever the number of columns, the entry, the grid or the warps of a CTA.

use gpu_kernels::case::{Random, bytes_of};
use gpu_kernels::driver::{Driver, MemKind, StreamId};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::kernels::product::{Args, Matrix};
use gpu_kernels::kernels::quantise_act::{Kind, kind_of};
use gpu_kernels::kernels::{mmvq, quantise_act};
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::tile;
use quant::table::FORMATS;
use quant::{ActGroup, BlockFormat, FloatFormat, Visitor, with_format};

const N_COLS: usize = 8;

/// Expected bits [column][row], and the kind of activations.
struct Bits<'a> {
    raw: &'a [u8],
    x: &'a [f32],
    k: usize,
}

impl Visitor for Bits<'_> {
    type Output = (Kind, Vec<u32>);

    fn block<F: BlockFormat>(self) -> Self::Output {
        let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
        ActGroup::quantise(kind_of::<F>().into(), self.x, &mut groups);
        // Blocks have alignment 1: any bytes are a row of them.
        let blocks: Vec<F> =
            self.raw.chunks_exact(size_of::<F>()).map(bytemuck::pod_read_unaligned).collect();
        let row_of = |column| blocks.chunks(self.k / F::ELEMS).map(move |row| (row, column));
        let products = groups.chunks(self.k / 32).flat_map(row_of);
        let bits = products.map(|(row, column)| mmvq::reference_bits(row, column).to_bits());
        (kind_of::<F>(), bits.collect())
    }

    fn float<F: FloatFormat>(self) -> Self::Output {
        unreachable!("only block formats are asked for")
    }
}

fn upload(emulator: &Emulator, bytes: &[u8]) -> DevicePtr {
    let at = emulator.alloc(MemKind::Device, bytes.len() as u64).unwrap();
    emulator.write(at, bytes, StreamId::DEFAULT).unwrap();
    at
}

fn run(emulator: &Emulator, launch: &Launch, y: DevicePtr, n: usize) -> Vec<u32> {
    emulator.launch(Emulator::MODULE, launch, StreamId::DEFAULT).unwrap();
    let mut bytes = vec![0; 4 * n];
    emulator.read(&mut bytes, y, StreamId::DEFAULT).unwrap();
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn bits_depend_on_the_weights_and_the_column_alone() {
    for format in FORMATS.iter().filter(|row| row.elems >= 32) {
        // Three spans, and where blocks allow it part of a fourth; rows of two row tiles.
        let k = if format.elems == 256 { 768 } else { 768 + 128 };
        let n_rows = 40;
        let mut random = Random::new(7);
        let (raw, _) = with_format(format.id, mmvq::Weights(&mut random, n_rows * k)).unwrap();
        let x = random.values(N_COLS * k);
        let (kind, expected) = with_format(format.id, Bits { raw: &raw, x: &x, k }).unwrap();
        let (q, scales) = quantise_act::reference(kind, &x);

        let emulator = Emulator::new(Options::default());
        let w = upload(&emulator, &tile::pack(format.id, &raw, n_rows, k));
        let (q, scales) = (upload(&emulator, &bytes_of(&q)), upload(&emulator, &bytes_of(&scales)));
        let y = upload(&emulator, &vec![0xff; 4 * N_COLS * n_rows]);
        let others = [0; 2].map(|_| upload(&emulator, &vec![0xff; 4 * N_COLS * n_rows]));
        let part = |y| Matrix { w, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y, n_rows };
        let product = |parts: &[Matrix], first: usize, n_cols: usize| {
            let (q, scales) = (q.offset((first * k) as u64), scales.offset((first * k / 32 * 8) as u64));
            let args = Args { format: format.id, parts, glu: None, q, scales, k, n_cols, mixture: None };
            mmvq::launch(&args).unwrap()
        };

        let of = |columns: std::ops::Range<usize>| &expected[columns.start * n_rows..columns.end * n_rows];
        for n_cols in [1, 2, 4, 8] {
            for first in (0..N_COLS).step_by(n_cols) {
                let launch = product(&[part(y)], first, n_cols);
                let got = run(&emulator, &launch, y, n_cols * n_rows);
                assert_eq!(got, of(first..first + n_cols), "{} {n_cols} columns from {first}", format.name);
            }
        }
        // A larger grid, as one of several matrices.
        let launch = product(&[part(others[0]), part(others[1]), part(y)], 2, 3);
        assert_eq!(run(&emulator, &launch, y, 3 * n_rows), of(2..5), "{} third part", format.name);
        // One warp does all spans: fewer warps than the launcher would take.
        let mut launch = product(&[part(y)], 5, 1);
        launch.cta = 32;
        assert_eq!(run(&emulator, &launch, y, n_rows), of(5..6), "{} one warp", format.name);
    }
}
