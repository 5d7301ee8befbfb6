//! Schema of the services: `grpc.reflection.v1`, for clients such as grpcurl. It is for administrators, like the
//! service that they would call with it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use prost::Message;
use tonic::{Code, Request, Response, Status, Streaming};
use towline_proto::pb;
use towline_proto::reflection::server_reflection_request::MessageRequest;
use towline_proto::reflection::server_reflection_response::MessageResponse;
use towline_proto::reflection::server_reflection_server::ServerReflection;
use towline_proto::reflection::{
    ErrorResponse, FileDescriptorResponse, ListServiceResponse, ServerReflectionRequest,
    ServerReflectionResponse, ServiceResponse,
};

/// Service that only agents have, on their own socket. Its messages are in the same schema.
const OF_AGENTS: &str = "towline.v1.Local";

/// Implementation of the service `grpc.reflection.v1.ServerReflection`.
pub struct ReflectionService {
    schema: Arc<Schema>,
}

/// The schema that was compiled in, by what clients ask for.
#[derive(Debug, Default)]
struct Schema {
    /// Full names of the services.
    services: Vec<String>,
    /// Encoded files by their names.
    files: BTreeMap<String, Vec<u8>>,
    /// Names of the files by the full names of what is defined in them.
    symbols: BTreeMap<String, String>,
}

/// A `google.protobuf.FileDescriptorSet`, whose files stay encoded.
#[derive(Clone, PartialEq, Message)]
struct FileSet {
    #[prost(bytes = "vec", repeated, tag = "1")]
    files: Vec<Vec<u8>>,
}

/// The part of a `FileDescriptorProto` that is looked at.
#[derive(Clone, PartialEq, Message)]
struct File {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "4")]
    messages: Vec<MessageType>,
    #[prost(message, repeated, tag = "5")]
    enums: Vec<Named>,
    #[prost(message, repeated, tag = "6")]
    services: Vec<ServiceType>,
}

/// The part of a `DescriptorProto` that is looked at.
#[derive(Clone, PartialEq, Message)]
struct MessageType {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    nested: Vec<MessageType>,
    #[prost(message, repeated, tag = "4")]
    enums: Vec<Named>,
}

/// The part of a `ServiceDescriptorProto` that is looked at.
#[derive(Clone, PartialEq, Message)]
struct ServiceType {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    methods: Vec<Named>,
}

/// Something of which only the name is looked at.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

impl ReflectionService {
    /// Creates the service of the schema that was compiled in.
    pub fn new() -> Self {
        // The schema is a part of the program, so it can be read. An empty one would refuse every request.
        let files = FileSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap_or_default().files;
        Self { schema: Arc::new(Schema::of(files)) }
    }
}

impl Default for ReflectionService {
    fn default() -> Self {
        Self::new()
    }
}

impl Schema {
    fn of(files: Vec<Vec<u8>>) -> Self {
        let mut schema = Self::default();
        for encoded in files {
            let Ok(file) = File::decode(encoded.as_slice()) else { continue };
            let mut names = Vec::new();
            for service in &file.services {
                let name = join(&file.package, &service.name);
                names.extend(service.methods.iter().map(|method| join(&name, &method.name)));
                if name != OF_AGENTS {
                    schema.services.push(name.clone());
                }
                names.push(name);
            }
            names.extend(file.enums.iter().map(|item| join(&file.package, &item.name)));
            for message in &file.messages {
                message.collect(&file.package, &mut names);
            }
            schema.symbols.extend(names.into_iter().map(|name| (name, file.name.clone())));
            schema.files.insert(file.name, encoded);
        }
        schema.services.sort();
        schema
    }

    fn answer(&self, request: ServerReflectionRequest) -> ServerReflectionResponse {
        let answer = match &request.message_request {
            Some(MessageRequest::FileByFilename(name)) => self.file(name),
            Some(MessageRequest::FileContainingSymbol(symbol)) => match self.symbols.get(symbol) {
                Some(name) => self.file(name),
                None => missing("the schema has no such symbol"),
            },
            Some(MessageRequest::ListServices(_)) => {
                let service = |name: &String| ServiceResponse { name: name.clone() };
                let service = self.services.iter().map(service).collect();
                MessageResponse::ListServicesResponse(ListServiceResponse { service })
            }
            Some(
                MessageRequest::FileContainingExtension(_)
                | MessageRequest::AllExtensionNumbersOfType(_),
            ) => missing("the schema has no extensions"),
            None => error(Code::InvalidArgument, "the request asks for nothing that is known here"),
        };
        ServerReflectionResponse {
            valid_host: request.host.clone(),
            original_request: Some(request),
            message_response: Some(answer),
        }
    }

    fn file(&self, name: &str) -> MessageResponse {
        match self.files.get(name) {
            Some(encoded) => {
                let file_descriptor_proto = vec![encoded.clone()];
                let response = FileDescriptorResponse { file_descriptor_proto };
                MessageResponse::FileDescriptorResponse(response)
            }
            None => missing("the schema has no such file"),
        }
    }
}

impl MessageType {
    /// Adds the full names of the message and of what is defined in it.
    fn collect(&self, outer: &str, names: &mut Vec<String>) {
        let name = join(outer, &self.name);
        names.extend(self.enums.iter().map(|item| join(&name, &item.name)));
        for nested in &self.nested {
            nested.collect(&name, names);
        }
        names.push(name);
    }
}

/// Returns the full name of what is defined in a package, a message or a service.
fn join(outer: &str, name: &str) -> String {
    if outer.is_empty() { name.to_owned() } else { format!("{outer}.{name}") }
}

fn missing(why: &str) -> MessageResponse {
    error(Code::NotFound, why)
}

fn error(code: Code, why: &str) -> MessageResponse {
    let (error_code, error_message) = (code as i32, why.to_owned());
    MessageResponse::ErrorResponse(ErrorResponse { error_code, error_message })
}

#[tonic::async_trait]
impl ServerReflection for ReflectionService {
    type ServerReflectionInfoStream =
        Pin<Box<dyn Stream<Item = Result<ServerReflectionResponse, Status>> + Send>>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let schema = self.schema.clone();
        // The next request is read once the client has taken the answer.
        let answers =
            request.into_inner().map(move |request| request.map(|request| schema.answer(request)));
        Ok(Response::new(Box::pin(answers)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: MessageRequest) -> MessageResponse {
        let request =
            ServerReflectionRequest { host: "h".to_owned(), message_request: Some(request) };
        let answer = ReflectionService::new().schema.answer(request.clone());
        assert_eq!((answer.valid_host.as_str(), answer.original_request), ("h", Some(request)));
        answer.message_response.unwrap()
    }

    /// Returns the names of the files of an answer.
    fn files(answer: &MessageResponse) -> Vec<String> {
        let MessageResponse::FileDescriptorResponse(files) = answer else { panic!("{answer:?}") };
        let name = |file: &Vec<u8>| File::decode(file.as_slice()).unwrap().name;
        files.file_descriptor_proto.iter().map(name).collect()
    }

    #[test]
    fn the_services_of_a_controller_are_listed_and_their_files_are_found() {
        let services = ask(MessageRequest::ListServices(String::new()));
        let MessageResponse::ListServicesResponse(services) = services else { panic!() };
        let names: Vec<&str> = services.service.iter().map(|service| &*service.name).collect();
        assert_eq!(
            names,
            [
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "towline.v1.Admin",
                "towline.v1.Discovery",
            ]
        );
        let symbol = |name: &str| ask(MessageRequest::FileContainingSymbol(name.to_owned()));
        for name in names.iter().copied().chain([
            "towline.v1.Admin.CreateToken",
            "towline.v1.Signed",
            "grpc.health.v1.HealthCheckResponse.ServingStatus",
        ]) {
            let found = files(&symbol(name));
            let [file] = &found[..] else { panic!("{name}: {found:?}") };
            let again = ask(MessageRequest::FileByFilename(file.clone()));
            assert_eq!(files(&again), found, "{name}");
        }
    }

    #[test]
    fn what_is_not_in_the_schema_is_an_answer_and_not_the_end_of_the_stream() {
        for request in [
            MessageRequest::FileContainingSymbol("towline.v1.Nothing".to_owned()),
            MessageRequest::FileByFilename("../ca.key".to_owned()),
            MessageRequest::AllExtensionNumbersOfType("towline.v1.Signed".to_owned()),
        ] {
            let MessageResponse::ErrorResponse(error) = ask(request) else { panic!() };
            assert_eq!(error.error_code, Code::NotFound as i32);
        }
    }
}
