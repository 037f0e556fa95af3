//! The routes, and what goes wrong on them: every error is a body in OpenAI's shape.

use super::guard::Denial;
use super::life::Phase;
use super::metrics::{self, Outcome};
use super::{Shared, api};
use crate::request::{Endpoint, Rejection, RejectionCode};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ALLOW, CACHE_CONTROL, CONNECTION,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, REFERRER_POLICY,
    RETRY_AFTER, VARY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::sync::{Arc, LazyLock};

/// The page, whole: scripts and styles are inside of it.
const PAGE: &str = include_str!("page/index.html");
/// What the page may do: run the script and the style inside of it, ask this server, and nothing else.
static PAGE_POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash_of_element(PAGE, "script"),
        hash_of_element(PAGE, "style")
    );
    HeaderValue::try_from(policy).expect("a policy is ASCII")
});
/// Seconds after which a client may try again.
const RETRY_AFTER_S: u64 = 1;
/// The same while the ranks load.
const RETRY_AFTER_LOADING_S: u64 = 5;

/// An error as OpenAI's API writes it.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_s: Option<u64>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: Some(code),
            retry_after_s: None,
        }
    }

    /// More is under way and waits than there is room for.
    pub fn full() -> Self {
        Self {
            retry_after_s: Some(RETRY_AFTER_S),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "queue_full",
                "too many requests wait already; try again later (--max-queue says how many may wait)",
            )
        }
    }

    /// The bodies of requests that have not been read yet hold as much as they may together.
    pub fn bodies_full() -> Self {
        Self {
            code: Some("bodies_full"),
            message:
                "the bodies of other requests hold as much memory as they may; try again later"
                    .into(),
            ..Self::full()
        }
    }

    /// The error that a phase means for a request; `None` where requests are answered.
    pub fn of_phase(phase: Phase) -> Option<Self> {
        let unavailable = |code, message: &str, retry_after_s| Self {
            retry_after_s: Some(retry_after_s),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
        };
        match phase {
            Phase::Ready => None,
            Phase::Loading => Some(unavailable(
                "loading",
                "the ranks are still loading the model; try again later",
                RETRY_AFTER_LOADING_S,
            )),
            Phase::Draining | Phase::Ended => Some(unavailable(
                "draining",
                "the server is about to end and takes no new requests",
                RETRY_AFTER_LOADING_S,
            )),
            Phase::Failed(why) => Some(unavailable("failed", why, RETRY_AFTER_LOADING_S)),
        }
    }

    /// What went wrong inside, such as a failed rank.
    pub fn inside(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The body.
    pub fn body(&self) -> serde_json::Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }

    fn outcome(&self) -> Outcome {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => Outcome::Full,
            StatusCode::SERVICE_UNAVAILABLE => Outcome::Unavailable,
            status if status.is_server_error() => Outcome::Failed,
            _ => Outcome::Refused,
        }
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let status = match rejection.code {
            // The body is what it should be; it is this model that cannot go on from it.
            RejectionCode::PromptNotTokenizable | RejectionCode::TokenOutOfVocabulary => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            _ => StatusCode::BAD_REQUEST,
        };
        Self {
            param: rejection.field,
            ..Self::new(status, rejection.code.as_str(), rejection.message)
        }
    }
}

impl From<Denial> for ApiError {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::Key => Self::new(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "this server needs a key that it knows: Authorization: Bearer KEY",
            ),
            Denial::Host(host) if host.is_empty() => Self::new(
                StatusCode::FORBIDDEN,
                "unknown_host",
                "the request does not say which host it is for; send a Host header with this server's address",
            ),
            Denial::Host(host) => Self::new(
                StatusCode::FORBIDDEN,
                "unknown_host",
                format!(
                    "{:?} is no name of this server; use its address, or start it with --allow-host",
                    shorten(&host)
                ),
            ),
            Denial::Origin(origin) => Self::new(
                StatusCode::FORBIDDEN,
                "unknown_origin",
                format!(
                    "pages of {:?} may not call this server; start it with --cors-origin to let them",
                    shorten(&origin)
                ),
            ),
        }
    }
}

/// The beginning of what a client wrote.
fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // What is left of a body that was not read would be taken for the next request.
        if matches!(
            self.status,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT
        ) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// All routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics_page))
        .route("/api/pipeline", get(pipeline))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .fallback(any(not_found))
        .method_not_allowed_fallback(not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), check))
        .with_state(shared)
}

/// What goes before every route: where the request comes from, and whether it has a key.
async fn check(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if headers.get_all(HOST).iter().nth(1).is_some() {
        // Whoever passed the request on may have looked at another one.
        let error = ApiError::new(
            StatusCode::BAD_REQUEST,
            "several_hosts",
            "the request has more than one Host header",
        );
        return error.into_response();
    }
    let authority = request
        .uri()
        .authority()
        .map(|authority| authority.as_str());
    if let Err(denial) = shared.guard.check_place(headers, authority) {
        return ApiError::from(denial).into_response();
    }
    let origin = headers.get(ORIGIN).cloned();
    let origin = origin.filter(|origin| {
        origin
            .to_str()
            .is_ok_and(|origin| shared.guard.allows_origin(origin))
    });
    let is_preflight = request.method() == Method::OPTIONS && origin.is_some();
    let is_public = matches!(request.uri().path(), "/" | "/health");
    let mut response = if is_preflight {
        StatusCode::NO_CONTENT.into_response()
    } else {
        match shared.guard.check_key(headers) {
            Err(denial) if !is_public => ApiError::from(denial).into_response(),
            _ => next.run(request).await,
        }
    };
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(VARY, HeaderValue::from_static("Origin"));
        headers.insert(
            ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("Retry-After"),
        );
        if is_preflight {
            headers.insert(
                ACCESS_CONTROL_ALLOW_METHODS,
                HeaderValue::from_static("GET, POST"),
            );
            // The official clients send headers of their own, which say nothing that is used here.
            headers.insert(
                ACCESS_CONTROL_ALLOW_HEADERS,
                HeaderValue::from_static("*, Authorization"),
            );
            headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        }
    }
    response
}

/// What is between the tags of the only element of this name, as a Content-Security-Policy names it.
fn hash_of_element(page: &str, name: &str) -> String {
    let rest = page.split_once(&format!("<{name}>")).map(|(_, rest)| rest);
    let text = rest.and_then(|rest| rest.split_once(&format!("</{name}>")));
    let (text, _) = text.expect("the page has a script and a style");
    format!("sha256-{}", BASE64.encode(Sha256::digest(text)))
}

async fn page() -> Response {
    let headers: [(HeaderName, HeaderValue); 3] = [
        (
            CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (CONTENT_SECURITY_POLICY, PAGE_POLICY.clone()),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, PAGE).into_response()
}

/// 200 once all ranks are ready, 503 before, and while nothing new is taken.
async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let phase = shared.life.phase();
    let status = match phase {
        Phase::Loading => "loading",
        Phase::Ready => "ready",
        Phase::Draining | Phase::Ended => "draining",
        Phase::Failed(_) => "failed",
    };
    let code = match phase {
        Phase::Ready => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (code, Json(json!({"status": status}))).into_response()
}

async fn metrics_page(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, metrics::text(&shared)).into_response()
}

async fn pipeline(State(shared): State<Arc<Shared>>) -> Response {
    let (now, running, waiting) = shared.now();
    let about = shared.ready.get().map(|ready| &ready.about);
    let ranks = about.map_or(&[][..], |about| &about.ranks);
    let ranks: Vec<_> = ranks
        .iter()
        .enumerate()
        .map(|(rank, about)| {
            let now = now.ranks.get(rank).copied().unwrap_or_default();
            json!({
                "rank": rank,
                "host": about.host,
                "device": about.device,
                "layers": [about.layers.start, about.layers.end],
                "embedding": about.has_embedding,
                "head": about.has_head,
                "weight_bytes": about.weight_bytes,
                "cache_bytes": about.cache_bytes,
                "memory_limit_bytes": about.memory_limit_bytes,
                "busy": now.busy,
                "wait": now.wait,
                "wire": now.wire,
                "sent_bytes": now.sent_bytes,
            })
        })
        .collect();
    let body = json!({
        "model": about.map(|about| &about.model),
        "version": env!("CARGO_PKG_VERSION"),
        "ready": shared.life.phase() == Phase::Ready,
        "uptime_s": shared.started.elapsed().as_secs_f64(),
        "ranks": ranks,
        "idle_share": now.idle_share,
        "tokens_per_second": now.tokens_per_second,
        "prompt_tokens_per_second": now.prompt_tokens_per_second,
        "running": running,
        "waiting": waiting,
        "kv_used_tokens": now.kv_used_tokens,
        "kv_total_tokens": about.map_or(0, |about| about.kv_total_tokens),
    });
    ([(CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

/// The model as the API describes one.
fn described(shared: &Shared, id: &str) -> serde_json::Value {
    json!({"id": id, "object": "model", "created": shared.started_s, "owned_by": "mlx-pipe"})
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let models = shared
        .ready
        .get()
        .map(|ready| described(&shared, &ready.about.model));
    Json(json!({"object": "list", "data": models.into_iter().collect::<Vec<_>>()})).into_response()
}

async fn model(
    State(shared): State<Arc<Shared>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Response {
    match shared.ready.get() {
        Some(ready) if ready.about.model == id => {
            Json(described(&shared, &ready.about.model)).into_response()
        }
        _ => ApiError::new(
            StatusCode::NOT_FOUND,
            "model_not_found",
            format!(
                "there is no model {:?} here; /v1/models says which there is",
                shorten(&id)
            ),
        )
        .into_response(),
    }
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    answer(shared, Endpoint::Completion, request).await
}

async fn chat_completions(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    answer(shared, Endpoint::Chat, request).await
}

async fn answer(shared: Arc<Shared>, endpoint: Endpoint, request: Request<Body>) -> Response {
    let answered = api::answer(Arc::clone(&shared), endpoint, request).await;
    answered.unwrap_or_else(|error| {
        shared.metrics.outcome(error.outcome());
        error.into_response()
    })
}

async fn not_found(request: Request) -> Response {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "not_found",
        format!(
            "there is nothing at {:?}; there is /v1/chat/completions, /v1/completions, /v1/models, /health, \
             /metrics, /api/pipeline and the page at /",
            shorten(request.uri().path())
        ),
    )
    .into_response()
}

async fn not_allowed(request: Request) -> Response {
    let path = request.uri().path();
    let allowed = match path.ends_with("completions") {
        true => "POST",
        false => "GET",
    };
    let error = ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} takes {allowed} only", shorten(path)),
    );
    let mut response = error.into_response();
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allowed));
    response
}
