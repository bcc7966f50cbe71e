//! The entries of `for_each_table`.

use super::block::{Appended, Attention, Inputs};
use super::store::{Class, Half, Split, Unpacked};
use crate::device::{F32x2, Glb, U32x2};

/// Entry of a tile.
#[inline(always)]
fn attend<
    C: Class,
    const STAGES: usize,
    const KS: usize,
    const NS: usize,
    const NO: usize,
    const SHARERS: usize,
    const GROUPS: usize,
>(
    q: Glb<F32x2>,
    k: Glb<u8>,
    v: Glb<u8>,
    out: Glb<F32x2>,
    scales: Glb<U32x2>,
    scratch: Glb<F32x2>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    pages: Glb<u32>,
    sinks: Glb<f32>,
    slopes: Glb<f32>,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    row_bytes_k: u32,
    row_bytes_v: u32,
    format_k: u32,
    format_v: u32,
    flags: u32,
    window: u32,
    scale: f32,
    softcap: f32,
    n_spans: u32,
    new_k: Glb<F32x2>,
    new_v: Glb<F32x2>,
    cells: Glb<u32>,
    angles: Glb<F32x2>,
) {
    let inputs = Inputs {
        q,
        k,
        v,
        out,
        scales,
        scratch,
        positions,
        token_sequences,
        sequences,
        pages,
        sinks,
        slopes,
        n_tokens,
        n_head,
        n_head_kv,
        head_dim: [head_dim_k, head_dim_v],
        row_bytes: [row_bytes_k, row_bytes_v],
        format: [format_k, format_v],
        flags,
        window,
        scale,
        softcap,
        n_spans,
        appended: Appended { k: new_k, v: new_v, cells, angles },
    };
    if const { Attention::<C, STAGES, KS, NS, NO, SHARERS, GROUPS>::TILE.per_token() } {
        Attention::<C, STAGES, KS, NS, NO, SHARERS, GROUPS>::decode(inputs);
    } else {
        Attention::<C, STAGES, KS, NS, NO, SHARERS, GROUPS>::prefill(inputs);
    }
}

/// Entries of a table, see `for_each_table`.
macro_rules! entries {
    ($file:literal $table:ident $prefix:literal $bounds:tt
        $($dim:literal $suffix:literal $class:ident $kind:ident $stages:literal
            [$ks:literal $ns:literal $no:literal] [$sharers:literal $groups:literal];)*) => {
        kernels! {
            in $file;
            pub(super) $table: threads $bounds, early;
            fn (
                q: Glb<F32x2>, k: Glb<u8>, v: Glb<u8>, out: Glb<F32x2>, scales: Glb<U32x2>, scratch: Glb<F32x2>,
                positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>, pages: Glb<u32>,
                sinks: Glb<f32>, slopes: Glb<f32>,
                n_tokens: u32, n_head: u32, n_head_kv: u32, head_dim_k: u32, head_dim_v: u32,
                row_bytes_k: u32, row_bytes_v: u32, format_k: u32, format_v: u32,
                flags: u32, window: u32, scale: f32, softcap: f32, n_spans: u32,
                new_k: Glb<F32x2>, new_v: Glb<F32x2>, cells: Glb<u32>, angles: Glb<F32x2>,
            );
            $(concat!($prefix, $dim, "_", $suffix) =>
                attend::<$kind, $stages, $ks, $ns, $no, $sharers, $groups>;)*
        }
    };
}
for_each_table!(entries);
