//! Which tensor gets which format: llama-quantize's mixes, so that files made here equal files made there.
//!
//! The facts are those of llama.cpp's `src/llama-quant.cpp`; `quantize/tests.rs` compares the result for every
//! file type with what llama-quantize gave. The rules count the tensors of a kind in file order ([`Mixer`] keeps the counts), so
//! tensors must be asked for in the order in which they are written.

use anyhow::{Result, bail};
use quant::{FormatId, table};
use regex_lite::Regex;

use super::file_type::FileType;

/// What a tensor is for, as far as the mixes care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Output,
    TokenEmbedding,
    AttnQkv,
    AttnKvB,
    AttnV,
    AttnK,
    AttnQ,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

impl Kind {
    fn of(name: &str) -> Kind {
        const PARTS: &[(&str, Kind)] = &[
            ("attn_qkv.weight", Kind::AttnQkv),
            ("attn_kv_b.weight", Kind::AttnKvB),
            ("attn_v.weight", Kind::AttnV),
            ("attn_k.weight", Kind::AttnK),
            ("attn_q.weight", Kind::AttnQ),
            ("attn_output.weight", Kind::AttnOutput),
            ("ffn_up", Kind::FfnUp),
            ("ffn_gate", Kind::FfnGate),
            ("ffn_down", Kind::FfnDown),
        ];
        match name {
            "output.weight" => Kind::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Kind::TokenEmbedding,
            _ => PARTS.iter().find(|(part, _)| name.contains(part)).map_or(Kind::Other, |p| p.1),
        }
    }

    /// Values carry more of the result than keys: the mixes treat them alike, joined or not.
    fn is_value(self) -> bool {
        matches!(self, Kind::AttnV | Kind::AttnQkv | Kind::AttnKvB)
    }
}

/// Tensors that stay as they are whatever is asked: small, or harmed by it. Parts of names.
const KEPT: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
];

/// What the user asks for.
#[derive(Debug)]
pub struct Request {
    /// Overall type.
    pub file_type: FileType,
    /// One format for all, no mix.
    pub pure: bool,
    /// Keep `output.weight` as it is.
    pub leave_output_tensor: bool,
    /// Format of `output.weight`.
    pub output_tensor_type: Option<FormatId>,
    /// Format of the token embedding.
    pub token_embedding_type: Option<FormatId>,
    /// Formats by name; the first match counts.
    pub tensor_types: Vec<(Regex, FormatId)>,
}

/// What the mixes need to know of a model.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// Architecture.
    pub arch: String,
    /// Layers.
    pub n_layer: usize,
    /// Query heads per key/value head.
    pub n_gqa: usize,
    /// Experts; 0 = none.
    pub n_expert: usize,
    /// Whether an importance matrix is at hand.
    pub has_imatrix: bool,
    /// Whether the output uses the token embedding.
    pub tied: bool,
    /// Tensors of values in the whole file.
    pub n_value_tensors: usize,
}

impl ModelFacts {
    /// Fills in what tensor names tell.
    pub fn with_tensors<'a>(mut self, names: impl Iterator<Item = &'a str>) -> ModelFacts {
        for kind in names.map(Kind::of) {
            self.n_value_tensors += usize::from(kind.is_value());
            self.tied &= kind != Kind::Output;
        }
        self
    }
}

/// Chooses formats, tensor by tensor in file order.
pub struct Mixer<'a> {
    request: &'a Request,
    facts: &'a ModelFacts,
    i_value: usize,
    i_down: usize,
    /// Tensors whose width did not fit.
    pub n_fallback: usize,
}

/// The first and last eighth of the layers and every third between.
fn use_more_bits(il: usize, n: usize) -> bool {
    il < n / 8 || il >= 7 * n / 8 || (il - n / 8) % 3 == 2
}

impl<'a> Mixer<'a> {
    /// Before the first tensor.
    pub fn new(request: &'a Request, facts: &'a ModelFacts) -> Mixer<'a> {
        Mixer { request, facts, i_value: 0, i_down: 0, n_fallback: 0 }
    }

    /// The format of the next tensor; `ne` is its shape, innermost first.
    pub fn choose(&mut self, name: &str, current: FormatId, ne: &[u64]) -> Result<FormatId> {
        if !self.quantises(name, ne) {
            return Ok(current);
        }
        let (kind, r) = (Kind::of(name), self.request);
        let named = r.tensor_types.iter().find(|(pattern, _)| pattern.is_match(name)).map(|t| t.1);
        // The per-layer table is large: an explicit name goes before --token-embedding-type there.
        let by_name_first = name == "per_layer_token_embd.weight" && named.is_some();
        match (kind, r.token_embedding_type, r.output_tensor_type) {
            (Kind::TokenEmbedding, Some(format), _) if !by_name_first => return Ok(format),
            (Kind::Output, _, Some(format)) => return Ok(format),
            _ => {}
        }
        let default = r.file_type.format();
        if table::info(default).elems == 1 {
            return Ok(default);
        }
        let wanted = match named {
            Some(format) => format,
            None if r.pure => default,
            None => self.mix(name, kind, default, ne)?,
        };
        self.fit(wanted, ne[0])
    }

    fn quantises(&self, name: &str, ne: &[u64]) -> bool {
        let dims = ne.iter().rposition(|&n| n > 1).map_or(1, |i| i + 1);
        dims >= 2
            && name.ends_with("weight")
            && !KEPT.iter().any(|part| name.contains(part))
            && !matches!(name, "position_embd.weight" | "token_types.weight")
            && (name != "output.weight" || !self.request.leave_output_tensor)
    }

    /// A format whose blocks fit the width.
    fn fit(&mut self, wanted: FormatId, cols: u64) -> Result<FormatId> {
        use FormatId::*;
        let fits = |format| cols.is_multiple_of(table::info(format).elems as u64);
        if fits(wanted) {
            return Ok(wanted);
        }
        self.n_fallback += 1;
        let other = match wanted {
            IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
            Q2_0 | Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
            Q4_K => Q5_0,
            Q5_K => Q5_1,
            Q6_K => Q8_0,
            narrow if table::info(narrow).elems <= 32 => narrow,
            _ => bail!("rows of {cols} elements do not fit {wanted}, and nothing stands in for it"),
        };
        Ok(if fits(other) { other } else { F16 })
    }

    fn mix(&mut self, name: &str, kind: Kind, default: FormatId, ne: &[u64]) -> Result<FormatId> {
        use FormatId::*;
        let (ft, f) = (self.request.file_type, self.facts);
        if kind == Kind::Output || (f.tied && kind == Kind::TokenEmbedding) {
            if let Some(format) = self.request.output_tensor_type {
                return Ok(format);
            }
            let fits = ne[0].is_multiple_of(table::info(default).elems as u64);
            return Ok(match ft {
                FileType::MXFP4_MOE => Q8_0,
                _ if !fits || f.arch == "falcon" => Q8_0,
                FileType::IQ2_XXS | FileType::IQ2_XS | FileType::IQ3_XXS | FileType::IQ1_S => Q5_K,
                FileType::IQ2_S | FileType::IQ2_M | FileType::IQ1_M => Q5_K,
                _ if default == Q8_0 => Q8_0,
                _ => Q6_K,
            });
        }
        if ft == FileType::MXFP4_MOE {
            let experts = ne.get(2).is_some_and(|&n| n > 1);
            return Ok(if experts { MXFP4 } else { Q8_0 });
        }
        if kind == Kind::TokenEmbedding {
            return Ok(match ft {
                FileType::IQ2_XXS | FileType::IQ2_XS | FileType::IQ1_S | FileType::IQ1_M => Q2_K,
                FileType::IQ2_S | FileType::IQ2_M | FileType::IQ3_XXS => IQ3_S,
                FileType::TQ1_0 | FileType::TQ2_0 | FileType::Q2_0 => Q4_K,
                _ => default,
            });
        }
        let low = matches!(ft, FileType::IQ2_XXS | FileType::IQ2_XS | FileType::IQ1_S | FileType::IQ1_M);
        let low_s = matches!(ft, FileType::IQ2_S | FileType::IQ2_M);
        if low || low_s {
            return Ok(self.mix_lowest(kind, default, low_s));
        }
        Ok(match kind {
            k if k.is_value() => self.mix_value(default),
            Kind::AttnK if f.n_expert == 8 => Q8_0,
            Kind::AttnK | Kind::AttnQ => match ft {
                FileType::IQ3_XS => IQ3_XXS,
                FileType::IQ3_XXS => IQ2_S,
                _ => default,
            },
            Kind::FfnDown => self.mix_down(name, default)?,
            Kind::AttnOutput => self.mix_attn_output(default),
            Kind::FfnGate | Kind::FfnUp if ft == FileType::IQ3_XS => {
                let (il, n) = (layer_of(name)?, f.n_layer);
                if il >= n / 8 && il < 7 * n / 8 { IQ3_XXS } else { default }
            }
            _ => default,
        })
    }

    /// Types of about two bits and less.
    fn mix_lowest(&mut self, kind: Kind, default: FormatId, low_s: bool) -> FormatId {
        use FormatId::*;
        let f = self.facts;
        let better = if low_s { IQ3_S } else { Q2_K };
        match kind {
            k if k.is_value() => {
                self.i_value += 1;
                if f.n_gqa >= 4 || f.n_expert >= 4 { Q4_K } else { better }
            }
            Kind::AttnK if f.n_expert == 8 => Q4_K,
            Kind::FfnDown => {
                self.i_down += 1;
                if self.i_down <= f.n_layer / 8 { better } else { default }
            }
            Kind::AttnOutput if f.n_expert == 8 => Q5_K,
            Kind::AttnOutput if low_s => IQ3_S,
            Kind::AttnOutput if matches!(default, IQ1_S | IQ1_M) => IQ2_XXS,
            _ => default,
        }
    }

    fn mix_value(&mut self, default: FormatId) -> FormatId {
        use FormatId::*;
        let (ft, f, i) = (self.request.file_type, self.facts, self.i_value);
        self.i_value += 1;
        let grouped = f.n_gqa >= 4;
        let mut format = match ft {
            FileType::Q2_K if grouped => Q4_K,
            FileType::Q2_K => Q3_K,
            FileType::Q2_K_S if grouped => Q4_K,
            FileType::IQ3_XXS if grouped => Q4_K,
            FileType::IQ3_XXS if f.has_imatrix => IQ3_XXS,
            FileType::IQ3_XXS => IQ3_S,
            FileType::IQ3_XS | FileType::IQ3_S if grouped => Q4_K,
            FileType::IQ3_M => Q4_K,
            FileType::Q3_K_M if i < 2 => Q5_K,
            FileType::Q3_K_M => Q4_K,
            FileType::Q3_K_L => Q5_K,
            FileType::IQ4_NL | FileType::IQ4_XS if grouped => Q5_K,
            FileType::Q4_K_M | FileType::Q5_K_M if use_more_bits(i, f.n_value_tensors) => Q6_K,
            FileType::Q4_K_S if i < 4 => Q5_K,
            _ => default,
        };
        // Eight query heads share the values of a 70B llama: more bits there cost next to nothing.
        if f.arch == "llama" && f.n_layer == 80 && f.n_gqa > 1 && matches!(format, Q3_K | Q4_K) {
            format = Q5_K;
        }
        if f.n_expert == 8 { Q8_0 } else { format }
    }

    fn mix_down(&mut self, name: &str, default: FormatId) -> Result<FormatId> {
        use FormatId::*;
        let (ft, f) = (self.request.file_type, self.facts);
        let (il, n) = (if f.n_expert > 1 { layer_of(name)? } else { self.i_down }, f.n_layer);
        if il >= n && f.n_expert > 1 {
            bail!("{name}: layer {il} of a model with {n} layers");
        }
        self.i_down += 1;
        let (falcon, first) = (f.arch == "falcon", il < n / 8);
        Ok(match ft {
            FileType::Q2_K => Q3_K,
            FileType::Q2_K_S if first => Q4_K,
            FileType::IQ3_XXS if !f.has_imatrix => {
                if first {
                    Q4_K
                } else {
                    Q3_K
                }
            }
            FileType::Q3_K_M if il < n / 16 => Q5_K,
            FileType::Q3_K_M if !falcon || use_more_bits(il, n) => Q4_K,
            FileType::Q3_K_M => Q3_K,
            FileType::IQ3_M if first || (f.n_expert == 8 && use_more_bits(il, n)) => Q4_K,
            FileType::Q3_K_L => {
                if falcon {
                    Q4_K
                } else {
                    Q5_K
                }
            }
            FileType::Q4_K_M if falcon && il < n / 16 => Q6_K,
            FileType::Q4_K_M if use_more_bits(il, n) => {
                if falcon {
                    Q5_K
                } else {
                    Q6_K
                }
            }
            FileType::IQ4_NL | FileType::IQ4_XS if first && !f.has_imatrix => Q5_K,
            FileType::Q5_K_M if use_more_bits(il, n) => Q6_K,
            FileType::Q4_K_S if first && !falcon => Q5_K,
            // With an importance matrix the first layers can go astray in formats without an offset.
            FileType::Q4_0 if f.has_imatrix && first => Q4_1,
            FileType::Q5_0 if f.has_imatrix && first => Q5_1,
            _ => default,
        })
    }

    fn mix_attn_output(&self, default: FormatId) -> FormatId {
        use FormatId::*;
        let (ft, f) = (self.request.file_type, self.facts);
        if f.arch == "falcon" {
            return if ft == FileType::Q3_K_L { Q4_K } else { default };
        }
        if f.n_expert == 8 {
            return match ft {
                FileType::Q2_K
                | FileType::Q3_K_S
                | FileType::Q3_K_M
                | FileType::Q4_K_S
                | FileType::Q4_K_M => Q5_K,
                FileType::IQ3_XS | FileType::IQ3_XXS | FileType::IQ3_S | FileType::IQ3_M => Q5_K,
                FileType::IQ4_NL | FileType::IQ4_XS => Q5_K,
                _ => default,
            };
        }
        match ft {
            FileType::Q2_K => Q3_K,
            FileType::IQ3_XXS => IQ3_S,
            FileType::Q3_K_M | FileType::IQ3_M => Q4_K,
            FileType::Q3_K_L => Q5_K,
            _ => default,
        }
    }
}

/// Whether a tensor becomes garbage in this format without an importance matrix.
pub fn needs_imatrix(name: &str, format: FormatId, file_type: FileType) -> bool {
    use FormatId::*;
    let table = matches!(Kind::of(name), Kind::TokenEmbedding | Kind::Output);
    let low = matches!(format, IQ3_XXS | IQ2_XXS | IQ2_XS | IQ2_S | IQ1_M | IQ1_S);
    !table && (low || (format == Q2_K && file_type == FileType::Q2_K_S))
}

/// The layer that a name `blk.N.…` says.
fn layer_of(name: &str) -> Result<usize> {
    let number = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
    number.map_or_else(|| bail!("{name}: no layer in the name"), Ok)
}

/// llama.cpp's order of tensors in a file: by layer (those without one first), then by name.
pub fn file_order(name: &str) -> (i64, &str) {
    (layer_of(name).map_or(-1, |il| il as i64), name)
}
