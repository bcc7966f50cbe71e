//! What ggml's `test-backend-ops perf` calls the work that a case times: the start of its line.

use alloc::format;
use alloc::string::String;

use quant::FormatId;

/// ggml's name of a format.
pub fn type_name(format: FormatId) -> String {
    let name = format!("{format:?}").to_ascii_lowercase();
    // Its super-block formats have a capital K.
    name.strip_suffix("_k").map_or(name.clone(), |stem| format!("{stem}_K"))
}

/// A product of one matrix, with nothing fused. A mixture is its experts, how many of them a token uses, and whether
/// they have activations of their own.
pub fn product(
    format: FormatId,
    rows: &[usize],
    k: usize,
    n_cols: usize,
    fused: bool,
    mixture: Option<(usize, usize, bool)>,
) -> Option<String> {
    let &[m] = rows else { return None };
    let ty = type_name(format);
    match mixture {
        _ if fused => None,
        None => Some(format!("MUL_MAT(type_a={ty},type_b=f32,m={m},n={n_cols},k={k},")),
        Some((n_mats, n_used, false)) => Some(format!(
            "MUL_MAT_ID(type_a={ty},type_b=f32,n_mats={n_mats},n_used={n_used},b=0,m={m},n={n_cols},k={k}"
        )),
        Some((.., true)) => None,
    }
}

/// A copy of a tensor whose dimensions, from the innermost on, are read in this order.
pub fn copy(from: FormatId, to: FormatId, shape: [usize; 4], order: [usize; 4]) -> String {
    let list = |items: [usize; 4]| items.map(|item| format!("{item}")).join(",");
    let (from, to, shape, order) = (type_name(from), type_name(to), list(shape), list(order));
    format!(
        "CPY(type_src={from},type_dst={to},ne_src=[{shape}],permute_src=[{order}],permute_dst=[0,0,0,0],_src_transpose=0"
    )
}

/// An operation on rows of f32.
pub fn rows(operation: &str, n: usize, n_rows: usize) -> String {
    format!("{operation}(type=f32,ne=[{n},{n_rows},1,1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ggmls() {
        assert_eq!(type_name(FormatId::Q4_K), "q4_K");
        assert_eq!(type_name(FormatId::IQ3_XXS), "iq3_xxs");
        let named = product(FormatId::Q4_0, &[4096], 14336, 1, false, None);
        assert_eq!(named.as_deref(), Some("MUL_MAT(type_a=q4_0,type_b=f32,m=4096,n=1,k=14336,"));
        assert_eq!(product(FormatId::Q4_0, &[4096], 14336, 1, true, None), None);
        assert_eq!(
            copy(FormatId::F32, FormatId::Q4_0, [8192, 512, 2, 1], [0; 4]),
            "CPY(type_src=f32,type_dst=q4_0,ne_src=[8192,512,2,1],permute_src=[0,0,0,0],permute_dst=[0,0,0,0],_src_transpose=0"
        );
        assert_eq!(rows("ARGMAX", 32_000, 512), "ARGMAX(type=f32,ne=[32000,512,1,1]");
    }
}
