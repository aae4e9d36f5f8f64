package fastvlm.app

import fastvlm.FastVlm
import fastvlm.Picture
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.isActive
import kotlinx.coroutines.launch

/**
 * The pieces of an answer as they come, computed off the main thread.
 *
 * Whoever stops collecting ends the computation, even within the prompt. A model answers one question at a time.
 */
fun FastVlm.answers(picture: Picture?, question: String, maxNewTokens: Int): Flow<String> {
    val model = this
    return callbackFlow {
        launch(Dispatchers.Default) {
            model.ask(picture, question, maxNewTokens) { piece ->
                if (isActive) trySend(piece) else model.cancel()
            }
            channel.close()
        }
        awaitClose { model.cancel() }
    }.buffer(Channel.UNLIMITED)
}
