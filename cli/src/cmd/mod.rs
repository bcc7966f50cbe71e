//! One file per verb (small relatives share one).

pub mod bench;
pub mod chat;
pub mod doctor;
pub mod inspect;
pub mod logits;
pub mod perplexity;
pub mod pull;
pub mod quantize;
pub mod run;
pub mod serve;
pub mod tokenize;
pub mod version;
