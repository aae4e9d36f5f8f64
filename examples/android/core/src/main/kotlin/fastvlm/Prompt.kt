package fastvlm

/**
 * One turn of a conversation.
 *
 * @property role `system`, `user` or `assistant`.
 * @property pictures How many pictures come with it; they stand before its text.
 */
class Message(val role: String, val text: String, val pictures: Int = 0)

/**
 * Token ids of a conversation that ends with a user's message, in the format that the model was trained on.
 *
 * The text around a picture is tokenized piece by piece, as the original code does.
 *
 * @return One more piece than there are pictures; a picture's tokens go between two pieces.
 * @throws IllegalArgumentException where the roles do not follow each other.
 */
fun promptSegments(messages: List<Message>, tokenizer: Tokenizer): List<IntArray> {
    checkRoles(messages)
    val segments = arrayListOf(ArrayList<Text>())
    fun write(text: String) = segments.last().add(Text(text, isFormat = true))
    if (messages[0].role != "system") write(BundleConstants.OPENING)
    for (message in messages) {
        val (before, after) = around(message.role)
        write(before)
        for (i in 0 until message.pictures) {
            write(BundleConstants.IMAGE_TEXT.substringBefore(BundleConstants.IMAGE_TOKEN))
            segments.add(ArrayList())
            write(BundleConstants.IMAGE_TEXT.substringAfter(BundleConstants.IMAGE_TOKEN))
        }
        segments.last().add(Text(message.text))
        write(after)
    }
    write(BundleConstants.GENERATION)
    return segments.map { tokenizer.encode(it) }
}

private fun around(role: String): Pair<String, String> = when (role) {
    "user" -> Pair(BundleConstants.USER_BEFORE, BundleConstants.USER_AFTER)
    "assistant" -> Pair(BundleConstants.ASSISTANT_BEFORE, BundleConstants.ASSISTANT_AFTER)
    else -> {
        val before = BundleConstants.SYSTEM_BEFORE
        val after = BundleConstants.SYSTEM_AFTER
        require(before != null && after != null) { "this model's prompt has no system message" }
        Pair(before, after)
    }
}

private fun checkRoles(messages: List<Message>) {
    val roles = messages.map { it.role }
    val spoken = if (roles.firstOrNull() == "system") roles.drop(1) else roles
    val isInTurn = spoken.withIndex().all { (i, role) -> role == if (i % 2 == 0) "user" else "assistant" }
    require(isInTurn && spoken.size % 2 == 1) {
        "the roles are $roles; begin with system or user, alternate user and assistant, and end with user"
    }
}
