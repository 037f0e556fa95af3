//! Tests of the import, on GGUF files made by `builder`: whole imports here, one file per part below.

mod blocks;
mod builder;
mod gguf;
mod output;
mod rope;
mod tokenizer;
mod whole;
