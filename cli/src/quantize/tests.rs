//! The mixes against what llama-quantize chose for SmolLM2-135M: every file type, tensor by tensor.

use quant::FormatId;
use regex_lite::Regex;

use super::file_type::FileType;
use super::mix::{Mixer, ModelFacts, Request, file_order};

fn request(file_type: FileType) -> Request {
    Request {
        file_type,
        pure: false,
        leave_output_tensor: false,
        output_tensor_type: None,
        token_embedding_type: None,
        tensor_types: Vec::new(),
    }
}

fn facts(has_imatrix: bool) -> ModelFacts {
    ModelFacts {
        arch: "llama".into(),
        n_layer: 30,
        n_gqa: 3,
        n_expert: 0,
        has_imatrix,
        tied: true,
        n_value_tensors: 0,
    }
}

/// Names and shapes (innermost first) of SmolLM2-135M in file order.
fn tensors() -> Vec<(String, Vec<u64>)> {
    let mut list = vec![
        ("output_norm.weight".to_owned(), vec![576]),
        ("token_embd.weight".to_owned(), vec![576, 49152]),
    ];
    for il in 0..30 {
        for (name, ne) in [
            ("attn_k", vec![576, 192]),
            ("attn_norm", vec![576]),
            ("attn_output", vec![576, 576]),
            ("attn_q", vec![576, 576]),
            ("attn_v", vec![576, 192]),
            ("ffn_down", vec![1536, 576]),
            ("ffn_gate", vec![576, 1536]),
            ("ffn_norm", vec![576]),
            ("ffn_up", vec![576, 1536]),
        ] {
            list.push((format!("blk.{il}.{name}.weight"), ne));
        }
    }
    list
}

fn choices(request: &Request, facts: &ModelFacts) -> Vec<(String, FormatId)> {
    let list = tensors();
    let facts = facts.clone().with_tensors(list.iter().map(|t| t.0.as_str()));
    let mut mixer = Mixer::new(request, &facts);
    list.iter().map(|(name, ne)| (name.clone(), mixer.choose(name, FormatId::F32, ne).unwrap())).collect()
}

#[test]
fn every_file_type_mixes_as_llama_quantize() {
    let Some(golden) = crate::chat::tests::golden("smollm2-135m/variants.json") else { return };
    let variants = golden["variants"].as_object().unwrap();
    let mut compared = 0;
    for (name, variant) in variants.iter().filter(|(name, _)| *name != "original-Q4_1") {
        // These two were made of Q8_0 with one --tensor-type for all layers.
        let by_name = matches!(name.as_str(), "MXFP4" | "NVFP4");
        let base = if by_name { "Q8_0" } else { name.trim_end_matches("-imatrix") };
        let mut request = request(FileType::parse(base).unwrap());
        if by_name {
            let pattern = Regex::new("blk.*weight").unwrap();
            request.tensor_types.push((pattern, FormatId::from_name(name).unwrap()));
        }
        assert_eq!(u64::from(request.file_type as u32), variant["file_type"].as_u64().unwrap(), "{name}");
        let low = ["IQ1", "IQ2", "IQ3"].iter().any(|p| name.starts_with(p));
        for (tensor, format) in choices(&request, &facts(low || name.ends_with("-imatrix"))) {
            let (layer, short) = match tensor.strip_prefix("blk.").and_then(|t| t.split_once('.')) {
                Some((layer, short)) => (layer, short),
                None => ("", tensor.as_str()),
            };
            let expected = variant["tensor_types"][short].as_object().unwrap().iter();
            let expected = expected.filter(|(_, layers)| {
                let layers = layers.as_str().unwrap();
                layers == "all" || layers.split(',').any(|l| l == layer)
            });
            let expected: Vec<&str> = expected.map(|e| e.0.as_str()).collect();
            assert_eq!(expected, [format.name()], "{name}: {tensor}");
            compared += 1;
        }
    }
    assert_eq!(compared, (variants.len() - 1) * 272);
}

#[test]
fn flags_go_before_the_mix() {
    let all = |request: &Request| choices(request, &facts(false));
    let of = |list: &[(String, FormatId)], name: &str| list.iter().find(|t| t.0 == name).unwrap().1;
    let mut r = request(FileType::Q4_K_M);
    r.token_embedding_type = Some(FormatId::F16);
    r.tensor_types.push((Regex::new("ffn_down").unwrap(), FormatId::Q8_0));
    let list = all(&r);
    assert_eq!(of(&list, "token_embd.weight"), FormatId::F16);
    assert_eq!(of(&list, "blk.3.ffn_down.weight"), FormatId::Q8_0);
    assert_eq!(of(&list, "blk.3.attn_norm.weight"), FormatId::F32);
    let mut pure = request(FileType::Q4_K_M);
    pure.pure = true;
    assert_eq!(of(&all(&pure), "blk.0.ffn_down.weight"), FormatId::Q4_K);
    assert_eq!(of(&all(&pure), "token_embd.weight"), FormatId::Q5_0, "576 is no multiple of 256");
}

#[test]
fn files_go_by_layer_then_name() {
    let mut names = ["blk.10.a", "output.weight", "blk.2.b", "blk.2.a"];
    names.sort_by(|a, b| file_order(a).cmp(&file_order(b)));
    assert_eq!(names, ["output.weight", "blk.2.a", "blk.2.b", "blk.10.a"]);
}
