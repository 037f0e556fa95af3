//! A request's way from its body to its answer.

use super::answers::{Event, Job, News, Piece, Waiting, most_events};
use super::connections::{AtWork, Seat};
use super::http::ApiError;
use super::life::Phase;
use super::metrics::Outcome;
use super::openai::{Choice, Shape, Writer};
use super::{Ready, Shared};
use crate::request::{Body, Endpoint, Form, Prompt, Rejection, RejectionCode, Request, Sampling};
use crate::sampler;
use crate::sequence::{Admitted, Sequence};
use crate::tokenizer::Tokenizer;
use axum::extract::Request as HttpRequest;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use http_body_util::BodyExt;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

/// Events that are taken at a time: what a client is behind comes in one piece.
const EVENTS_AT_A_TIME: usize = 64;
/// How long the reason for the end of the loop may take to be known.
const REASON_LIMIT: Duration = Duration::from_secs(2);
/// How often a client that waits for the next piece hears that it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A request that was understood, not yet under way.
struct Asked {
    shape: Shape,
    stream: bool,
    /// One a choice.
    admitted: Vec<Admitted<'static>>,
}

/// A request under way.
struct UnderWay {
    writer: Writer,
    events: mpsc::Receiver<Event>,
    phase: watch::Receiver<Phase>,
    /// One a choice; `None` once it has ended.
    choices: Vec<Choice>,
    waiting: Waiting,
    _at_work: Option<AtWork>,
}

/// Answers one request.
pub async fn answer(
    shared: Arc<Shared>,
    endpoint: Endpoint,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let asked_at = Instant::now();
    if let Some(error) = ApiError::of_phase(shared.life.phase()) {
        return Err(error);
    }
    check_type(request.headers())?;
    let seat = request.extensions().get::<Arc<Seat>>().cloned();
    let body = read_body(&shared, request).await?;
    let at_work = seat.map(|seat| seat.work());
    let asked = {
        let shared = Arc::clone(&shared);
        // Turning text into tokens may take long.
        let reading = tokio::task::spawn_blocking(move || read(&shared, endpoint, &body.bytes));
        let read = reading.await;
        read.map_err(|_| ApiError::inside("reading the request failed; this is a bug"))??
    };
    let is_streamed = asked.stream;
    let under_way = start(&shared, asked, asked_at, at_work)?;
    match is_streamed {
        true => Ok(under_way.stream()),
        false => under_way.whole().await,
    }
}

/// Only JSON, and not compressed: a web page can send anything else to another origin without being asked for permission.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next());
    if !kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body must be JSON and say so: Content-Type: application/json",
        ));
    }
    let is_plain = |encoding: &HeaderValue| encoding.as_bytes().eq_ignore_ascii_case(b"identity");
    match headers.get_all(CONTENT_ENCODING).iter().all(is_plain) {
        true => Ok(()),
        false => Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_content_encoding",
            "a body with Content-Encoding is not read; send it as it is, without that header",
        )),
    }
}

/// A body, counted among those that are held until it is dropped.
struct HeldBody {
    bytes: Vec<u8>,
    _held: Option<OwnedSemaphorePermit>,
}

/// The body, if it is neither too long nor too slow. What all requests together hold is bounded too.
async fn read_body(shared: &Shared, request: HttpRequest) -> Result<HeldBody, ApiError> {
    let most = shared.options.max_body;
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the body is longer than {most} bytes, which is what --max-body allows"),
        )
    };
    let length = request.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > most) {
        return Err(too_large());
    }
    let mut body = request.into_body();
    let reading = async {
        let mut bytes = Vec::new();
        let mut held: Option<OwnedSemaphorePermit> = None;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "body_broken",
                    format!("the body broke off: {error}"),
                )
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if (bytes.len() + data.len()) as u64 > most {
                return Err(too_large());
            }
            let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
            let more = Arc::clone(&shared.body_bytes).try_acquire_many_owned(count);
            let more = more.map_err(|_| ApiError::bodies_full())?;
            match &mut held {
                None => held = Some(more),
                Some(held) => held.merge(more),
            }
            bytes.extend_from_slice(&data);
        }
        Ok(HeldBody { bytes, _held: held })
    };
    let limit = Duration::from_secs(shared.options.body_s);
    let read = tokio::time::timeout(limit, reading).await;
    read.unwrap_or_else(|_| {
        Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_too_slow",
            format!(
                "the body did not arrive within {} s (--body-s)",
                limit.as_secs()
            ),
        ))
    })
}

/// Understands a body and turns its prompts into tokens.
fn read(shared: &Shared, endpoint: Endpoint, bytes: &[u8]) -> Result<Asked, ApiError> {
    let ready = shared
        .ready
        .get()
        .ok_or_else(|| ApiError::inside("not ready"))?;
    let body = Body::parse(bytes, Some(endpoint), &ready.defaults)?;
    let has_tools =
        matches!(body.prompts.first(), Some(Prompt::Chat(chat)) if !chat.tools.is_empty());
    if has_tools
        && !ready
            .rules
            .tokenizer
            .as_ref()
            .is_some_and(Tokenizer::knows_tools)
    {
        return Err(ApiError::from(Rejection::of_field(
            RejectionCode::UnsupportedField,
            "tools",
            "`tools` is not supported with this model: its chat template does not tell the model of tools in the \
             form <tool_call>{...}</tool_call>; leave it out",
        )));
    }
    let mut admitted = Vec::new();
    for mut prompt in body.prompts {
        for choice in 0..body.choices {
            let key = shared.next_key.fetch_add(1, Ordering::Relaxed);
            let request = Request {
                index: key as usize,
                line: 1,
                form: Form::Json(endpoint),
                prompt: prompt.clone(),
                sampling: sampling_of_choice(&body.sampling, choice as u64),
            };
            let one = Sequence::admit(request, ready.rules).map_err(|error| error.rejection)?;
            // Further answers to it need not turn it into tokens again.
            prompt = Prompt::Tokens(one.prompt.clone());
            admitted.push(one);
        }
    }
    let shape = Shape {
        endpoint,
        model: ready.about.model.clone(),
        fingerprint: ready.about.fingerprint.clone(),
        id: shared.next_key.fetch_add(1, Ordering::Relaxed),
        started_s: shared.started_s,
        created_s: now_s(),
        include_usage: body.include_usage,
        choices_per_prompt: body.choices,
        has_tools,
    };
    Ok(Asked {
        shape,
        stream: body.stream,
        admitted,
    })
}

/// The first choice of a prompt is what it would be alone; with a seed, the others have seeds that follow from it.
fn sampling_of_choice(sampling: &Sampling, choice: u64) -> Sampling {
    Sampling {
        seed: sampling.seed.map(|seed| match choice {
            0 => seed,
            _ => sampler::mix(seed ^ sampler::mix(choice)),
        }),
        ..sampling.clone()
    }
}

/// Hands a request to the loop.
fn start(
    shared: &Arc<Shared>,
    asked: Asked,
    asked_at: Instant,
    at_work: Option<AtWork>,
) -> Result<UnderWay, ApiError> {
    let ready = shared
        .ready
        .get()
        .ok_or_else(|| ApiError::inside("not ready"))?;
    let count = asked.admitted.len();
    let mut places = places(ready, count)?;
    let most_events = asked
        .admitted
        .iter()
        .map(|one| most_events(one.sequence.remaining_tokens()))
        .sum();
    let (sender, events) = mpsc::channel(most_events);
    let mut under_way = UnderWay {
        choices: (0..count)
            .map(|_| Choice::new(asked.shape.has_tools))
            .collect(),
        writer: Writer::new(asked.shape),
        events,
        phase: shared.life.watch(),
        waiting: Waiting::new(Arc::clone(shared)),
        _at_work: at_work,
    };
    for (choice, admitted) in asked.admitted.into_iter().enumerate() {
        let key = admitted.sequence.request().index as u64;
        let job = Job {
            key,
            choice,
            admitted,
            is_streamed: asked.stream,
            events: sender.clone(),
            asked: asked_at,
            place: places.split(1).ok_or_else(ApiError::full)?,
        };
        under_way.waiting.add(key);
        // There is room for as many jobs as there are places; the loop is gone where it fails.
        ready.jobs.try_send(job).map_err(|_| gone(shared))?;
    }
    under_way.waiting.begin();
    Ok(under_way)
}

/// The error of a loop that has ended.
fn gone(shared: &Shared) -> ApiError {
    let error = ApiError::of_phase(shared.life.phase());
    error.unwrap_or_else(|| ApiError::inside("the pipeline has ended"))
}

/// Places for so many sequences.
fn places(ready: &Ready, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
    if count > ready.place_count {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "too_many_choices",
            format!(
                "{count} answers in one request; this server has room for {} at a time (--max-queue)",
                ready.place_count
            ),
        ));
    }
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let places = Arc::clone(&ready.places).try_acquire_many_owned(count);
    places.map_err(|_| ApiError::full())
}

/// Seconds since 1970.
fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl UnderWay {
    /// The next events, as many as have come; or why there will be none.
    async fn next(&mut self, into: &mut Vec<Event>) -> Result<(), String> {
        tokio::select! {
            // What was answered goes before the news that the server ends.
            biased;
            count = self.events.recv_many(into, EVENTS_AT_A_TIME) => match count {
                0 => {}
                _ => return Ok(()),
            },
            failed = failure(&mut self.phase) => return Err(failed),
        }
        // The loop is gone; why, is said soon.
        let failed = tokio::time::timeout(REASON_LIMIT, failure(&mut self.phase)).await;
        Err(failed.unwrap_or_else(|_| "the pipeline has ended".to_owned()))
    }

    fn is_complete(&self) -> bool {
        self.choices.iter().all(Choice::has_ended)
    }

    /// The whole answer.
    async fn whole(mut self) -> Result<Response, ApiError> {
        if let Err(why) = self.complete().await {
            self.waiting.end(None);
            return Err(ApiError::inside(why));
        }
        self.waiting.end(Some(Outcome::Answered));
        Ok(self.writer.whole(&self.choices))
    }

    /// Waits until all is known; or why it will not be.
    async fn complete(&mut self) -> Result<(), String> {
        let mut events = Vec::new();
        while !self.is_complete() {
            self.next(&mut events).await?;
            for event in events.drain(..) {
                match event.news {
                    News::Piece(_) => {}
                    News::Finished(answer) => self.choices[event.choice].end(*answer),
                    News::Failed(why) => return Err(why),
                }
            }
        }
        Ok(())
    }

    /// The answer in pieces.
    fn stream(self) -> Response {
        let streaming = Streaming {
            ready: self.writer.begin(self.choices.len()).into(),
            under_way: self,
            has_ended: false,
        };
        let events = stream::unfold(streaming, |mut streaming| async {
            let event = streaming.next().await?;
            Some((
                Ok::<_, Infallible>(SseEvent::default().data(event)),
                streaming,
            ))
        });
        Sse::new(events)
            .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
            .into_response()
    }
}

/// Ends with the server's failure.
async fn failure(phase: &mut watch::Receiver<Phase>) -> String {
    match phase
        .wait_for(|phase| matches!(phase, Phase::Failed(_)))
        .await
        .as_deref()
    {
        Ok(Phase::Failed(why)) => (*why).to_owned(),
        _ => "the server has ended".to_owned(),
    }
}

/// An answer that is sent in pieces.
struct Streaming {
    under_way: UnderWay,
    /// Pieces ready to be sent.
    ready: VecDeque<String>,
    has_ended: bool,
}

impl Streaming {
    /// The next piece.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.has_ended {
            self.wait().await;
        }
        self.ready.pop_front()
    }

    /// Waits for the next events and writes them.
    async fn wait(&mut self) {
        let mut events = Vec::new();
        if let Err(why) = self.under_way.next(&mut events).await {
            return self.fail(&why);
        }
        let mut pieces: Vec<(usize, Piece)> = Vec::new();
        for event in events {
            match event.news {
                News::Piece(piece) => match pieces
                    .iter_mut()
                    .find(|(choice, _)| *choice == event.choice)
                {
                    Some((_, before)) => before.extend(piece),
                    None => pieces.push((event.choice, piece)),
                },
                News::Finished(answer) => {
                    let before = pieces
                        .iter()
                        .position(|(choice, _)| *choice == event.choice);
                    let before = before.map(|index| pieces.swap_remove(index).1);
                    let choice = &mut self.under_way.choices[event.choice];
                    choice.end(*answer);
                    let written = self.under_way.writer.last(event.choice, before, choice);
                    self.ready.extend(written);
                }
                News::Failed(why) => return self.fail(&why),
            }
        }
        for (index, piece) in pieces {
            let choice = &mut self.under_way.choices[index];
            self.ready
                .extend(self.under_way.writer.piece(index, piece, choice));
        }
        if self.under_way.is_complete() {
            self.has_ended = true;
            self.under_way.waiting.end(Some(Outcome::Answered));
            self.ready
                .extend(self.under_way.writer.end(&self.under_way.choices));
        }
    }

    fn fail(&mut self, why: &str) {
        self.has_ended = true;
        self.under_way.waiting.end(Some(Outcome::Failed));
        self.ready
            .push_back(ApiError::inside(why).body().to_string());
    }
}
