//! Runs a language model across a few machines, each holding only its own layers.
//!
//! The route of one token, and where to read about each part of it:
//!
//! 1. [`cli`] reads the command line; [`session`] takes a rank from the start of MPI to the report; in
//!    [`meeting`] it gets to know the others.
//! 2. [`cluster`], [`model::ModelFiles`], [`planning`] and [`plan`] decide, on every rank alike, which layers are whose;
//!    [`agree`] makes sure that it is alike.
//! 3. [`stage::Stage`] loads this rank's slice of the [`checkpoint`] through [`model`]; [`mod@slice`] knows where from, and
//!    [`handover`] carries it ([`parcel`]) from a rank that has the model to one that has not.
//! 4. [`prompts`] reads [`request`]s, or [`serve`] takes them over HTTP, a [`tokenizer`] and a [`sequence`] turn them into token ids.
//! 5. [`schedule`] puts tokens of several sequences into steps, within [`limits`]; [`wire`] makes bytes of them,
//!    [`transport`] carries these, also while a rank computes ([`meanwhile`]), and [`pipeline`] is the loop around:
//!    receive, compute, send.
//! 6. The last rank's [`sampler`] picks a token; rank 0 makes text of it and writes the answer.
//! 7. [`report`] tells what it cost, and a [`trace`] when.
//!
//! Apart from this route: [`calibrate`] measures what the plan calculates with and [`cost_store`] keeps it;
//! [`doctor`] looks at hosts and links before a run; [`import`] makes checkpoints of GGUF files, [`hub`] finds and downloads them.
#![deny(missing_docs)]

pub mod agree;
pub mod bell;
pub mod bounded_file;
pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod cores;
pub mod cost_store;
pub mod doctor;
pub mod handover;
pub mod hub;
pub mod import;
pub mod launcher;
pub mod limits;
pub mod log;
pub mod meanwhile;
pub mod meeting;
pub mod model;
pub mod parcel;
pub mod pipeline;
pub mod plan;
pub mod planning;
pub mod progress;
pub mod prompts;
pub mod report;
pub mod request;
pub mod sampler;
pub mod schedule;
pub mod sequence;
pub mod serve;
pub mod session;
pub mod slice;
pub mod stage;
pub mod tokenizer;
pub mod trace;
pub mod transport;
pub mod user_cache;
pub mod wait;
pub mod wire;
